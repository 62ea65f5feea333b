"""Who is waited for, and for how long: in joining, training, evaluation, the local reference and delivery."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import clock as clocks
import pytest
from flwr.app import Error, Message
from rich.console import Console
from tampered import NAMES, Tampered, edited, only

from quorate.client.site.site import Site
from quorate.deploy.console import ConsoleTracker
from quorate.server.exchange.presence import FIRST_PAUSE, LONGEST_PAUSE
from quorate.server.results.complete import complete_run
from quorate.server.rounds.best_round import BestRound
from quorate.server.rounds.loop import run_rounds
from quorate.server.rounds.run import METRICS_FILE, RECORD_FILE, Run, read_jsonl
from quorate.server.tracking.events import EVENTS_FILE, EventsReader
from quorate.server.tracking.records import Evaluation, RoundMetrics, RoundRecord
from quorate.shared.protocol.messages import Update

SIZES = {"north": 8, "south": 7, "west": 5}
FEDERATION = {"quorum": 2, "grace_seconds": 60, "timeout_seconds": 3600, "reask_seconds": 300}
SOUTH = 1002


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> clocks.Clock:
    return clocks.installed(monkeypatch)


class Falling(Tampered):
    """A grid on which one site hangs during some rounds.

    What it answers while it hangs is held back, and comes when it wakes. `gone`: it is off Flower's list
    instead, and its messages come back as Flower's errors.
    """

    def __init__(self, site: Site, hangs: range, *, gone: bool = False) -> None:
        super().__init__(site, lambda update: update)
        self.hangs, self.gone = hangs, gone
        self.asked_south: list[str] = []
        self.held_back: list[Message] = []
        self.round = 0

    @property
    def away(self) -> bool:
        return self.round in self.hangs

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in super().get_node_ids() if not (self.gone and self.away and node == SOUTH)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = list(messages)
        ids = list(super().push_messages(pushed))
        for request, message in zip(self.requests[-len(pushed) :], pushed, strict=True):
            self.round = max(self.round, request.header.round)
            if message.metadata.dst_node_id == SOUTH:
                self.asked_south.append(f"{request.header.phase} {request.header.round}")
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        out = []
        for message in super().pull_messages(message_ids):
            theirs = self.asked[message.metadata.reply_to_message_id].metadata.dst_node_id == SOUTH
            if not (theirs and self.away):
                out.append(message)
            elif self.gone:
                asked = self.asked[message.metadata.reply_to_message_id]
                out.append(Message(Error(3, "The node is not available."), reply_to=asked))
            else:
                self.held_back.append(message)
        if not self.away:
            wanted = set(message_ids)
            out += [each for each in self.held_back if each.metadata.reply_to_message_id in wanted]
            self.held_back = [each for each in self.held_back if each not in out]
        return out


def opened(make_run: Any, make_sites: Any, tmp_path: Path, **sections: Any) -> tuple[Site, Run]:
    site = Site(make_sites(**SIZES))
    sections["federation"] = {**FEDERATION, "rounds": 1, **sections.get("federation", {})}
    return site, Run.open(site.prepare(make_run(**sections)), tmp_path / "out")


def records(run: Run) -> list[Any]:
    return read_jsonl(run.output_dir / RECORD_FILE, RoundRecord)


@pytest.mark.parametrize("phase", ["join", "statistics", "fit", "evaluate", "alone", "finish"])
def test_a_silent_site_costs_an_exchange_its_grace_and_not_its_timeout(
    make_run: Any, make_sites: Any, tmp_path: Path, clock: clocks.Clock, phase: str
) -> None:
    evaluation = {"references": ["local_only"], "bootstrap_samples": 0}
    adapter = {"head": {"init": "analytic" if phase == "statistics" else "random"}}
    site, run = opened(make_run, make_sites, tmp_path, evaluation=evaluation, adapter=adapter)
    grid = Tampered(site, only("south", lambda _: None, phase))
    result = run_rounds(grid, run, NAMES)
    summary = complete_run(grid, run, result)
    assert summary.status == "done"
    # Grace once, and what the site's rounds take in the reference; the rest find it away. An evaluation may
    # go on for longer, so the test waits once more; so may loading a base model. Delivery is refused by all
    # the others here (they have no folder for it), and that says nothing of the one at work.
    grace, reask = FEDERATION["grace_seconds"], FEDERATION["reask_seconds"]
    longest = {"join": grace + reask, "evaluate": 2 * grace, "finish": grace + reask}.get(phase, grace)
    assert grace <= clock.waited < longest + grace / 2


def test_where_all_are_needed_a_silent_site_does_not_stall_what_the_run_can_do_without(
    make_run: Any, make_sites: Any, tmp_path: Path, clock: clocks.Clock
) -> None:
    site, run = opened(make_run, make_sites, tmp_path, federation={"quorum": 3})
    run_rounds(Tampered(site, only("south", lambda _: None, "evaluate")), run, NAMES)
    assert clock.waited == pytest.approx(FEDERATION["grace_seconds"] + FEDERATION["reask_seconds"], abs=2)


def test_figures_name_the_sites_that_were_not_measured(
    make_run: Any, make_sites: Any, tmp_path: Path, clock: clocks.Clock
) -> None:
    site, run = opened(make_run, make_sites, tmp_path)
    grid = Tampered(site, only("south", lambda _: None, "evaluate"))
    summary = complete_run(grid, run, run_rounds(grid, run, NAMES))
    (metrics,) = read_jsonl(run.output_dir / METRICS_FILE, RoundMetrics)
    assert metrics.validation.missing["south"].code == "timeout"
    assert set(metrics.validation.sites) == {"north", "west"}
    assert summary.best.test.missing["south"].code == "timeout"
    assert "Without south, which did not give figures" in (run.output_dir / "report.html").read_text()


@pytest.mark.parametrize("gone", [False, True])
def test_a_site_known_to_be_away_is_not_waited_for_again_and_counts_when_it_is_back(
    make_run: Any, make_sites: Any, tmp_path: Path, clock: clocks.Clock, gone: bool
) -> None:
    site, run = opened(make_run, make_sites, tmp_path, federation={"rounds": 8})
    grid = Falling(site, range(2, 6), gone=gone)
    run_rounds(grid, run, NAMES)
    counted = ["south" in record.weights for record in records(run)]
    assert counted[0] and not any(counted[1:5]) and all(counted[6:]), counted
    # One grace when it went, at most one while it comes back; four rounds without it would be eight.
    assert FEDERATION["grace_seconds"] <= clock.waited <= 2 * FEDERATION["grace_seconds"] + 5
    codes = [record.excluded["south"].code for record in records(run)[1:5]]
    assert codes == ["unreachable"] * 4 if gone else codes == ["timeout", "away", "away", "away"]


def test_a_site_that_hangs_is_not_sent_every_question(
    make_run: Any, make_sites: Any, tmp_path: Path, clock: clocks.Clock
) -> None:
    """It would work them all off, one by one, when it wakes."""
    site, run = opened(make_run, make_sites, tmp_path, federation={"rounds": 12})
    grid = Falling(site, range(2, 99))
    run_rounds(grid, run, NAMES)
    asked = Counter(each.split()[0] for each in grid.asked_south if each.split()[1] not in "01")
    assert sum(asked.values()) <= 4, asked


def test_a_lost_message_is_sent_again_as_it_was(
    make_run: Any, make_sites: Any, tmp_path: Path, clock: clocks.Clock
) -> None:
    lost: list[Update] = []

    def change(update: Update) -> Update | None:
        if update.header.phase == "fit" and update.header.site == "south" and not lost:
            lost.append(update)
            return None
        return update

    site, run = opened(make_run, make_sites, tmp_path, federation={"quorum": 3})
    grid = Tampered(site, change)
    run_rounds(grid, run, NAMES)
    assert set(records(run)[0].weights) == set(SIZES)
    assert FIRST_PAUSE <= clock.waited <= FIRST_PAUSE + 2
    fits = [each for each in grid.requests if each.header.phase == "fit" and each.header.site == "south"]
    assert len(fits) == 2 and fits[0].header == fits[1].header
    assert fits[0].arrays.content_hash == fits[1].arrays.content_hash


@pytest.mark.parametrize("gone", [False, True])
def test_a_site_that_missed_the_join_takes_part_once_it_answers(
    make_run: Any, make_sites: Any, tmp_path: Path, clock: clocks.Clock, gone: bool
) -> None:
    site, run = opened(make_run, make_sites, tmp_path, federation={"rounds": 5})
    grid = Falling(site, range(0, 2), gone=gone)
    result = run_rounds(grid, run, NAMES)
    cohorts = ["south" in record.cohort for record in records(run)]
    assert not cohorts[0] and cohorts[-1], cohorts
    assert "south" in records(run)[-1].weights
    assert "south" in result.members.sites and "south" not in result.members.refused
    assert clock.waited <= 2 * FEDERATION["grace_seconds"] + FEDERATION["reask_seconds"]


def test_a_latecomer_with_another_base_is_refused(
    make_run: Any, make_sites: Any, tmp_path: Path, clock: clocks.Clock
) -> None:
    site, run = opened(make_run, make_sites, tmp_path, federation={"rounds": 4})
    grid = Falling(site, range(0, 2))

    def other(update: Update) -> Update:
        assert update.header.description is not None
        description = update.header.description.model_copy(update={"model_files": {"model": "00"}})
        return Update(update.header.model_copy(update={"description": description}), update.arrays)

    grid.change = only("south", other, "join")
    result = run_rounds(grid, run, NAMES)
    assert result.members.refused["south"].code == "model"
    assert all("south" not in record.cohort for record in records(run))


def test_it_is_said_who_is_waited_for_and_since_when(
    make_run: Any, make_sites: Any, tmp_path: Path, clock: clocks.Clock
) -> None:
    site, run = opened(make_run, make_sites, tmp_path)
    said = io.StringIO()
    run.trackers = [*run.trackers, ConsoleTracker(Console(file=said, width=110))]
    run_rounds(Tampered(site, only("south", lambda _: None, "evaluate")), run, NAMES)
    waiting = [e.sites for e in EventsReader(run.output_dir / EVENTS_FILE).read() if e.event == "waiting"]
    assert [round(each["south"]) for each in waiting] == [10, 20, 30, 40, 50, 60] or len(waiting) == 5
    assert all(set(each) == {"south"} for each in waiting)
    lines = [line for line in said.getvalue().splitlines() if "waiting for south since" in line]
    assert [line.split("since ")[1] for line in lines] == ["10 s", "20 s", "40 s"]
    assert all("evaluate" in line for line in lines), "and in which step"


# --- Which round is the best, where not every site was measured in each


def scored(pooled: float, **sites: tuple[float, int]) -> Evaluation:
    return Evaluation(
        split="validation",
        pooled={"macro_f1": pooled},
        mean={},
        sites={site: {"macro_f1": value} for site, (value, _) in sites.items()},
        rows={site: rows for site, (_, rows) in sites.items()},
    )


def best(run: Any, rounds: Mapping[int, Evaluation]) -> BestRound:
    standing = BestRound()
    for number, evaluation in rounds.items():
        standing = standing.after(run, number, evaluation)
    return standing


def test_rounds_are_compared_on_the_sites_that_both_measured(make_run: Any) -> None:
    run = make_run(federation={"rounds": 9})
    whole = scored(0.6, north=(0.9, 10), south=(0.3, 10))
    # Without the site that is hard to please the pooled figure is better, though north does worse.
    assert best(run, {1: whole, 2: scored(0.8, north=(0.8, 10))}).round == 1
    better = best(run, {1: whole, 2: scored(0.95, north=(0.95, 10))})
    assert better.round == 2
    # South is back: north decides, and it does worse, though the pooled figure rose.
    back = {1: scored(0.95, north=(0.95, 10)), 2: scored(0.97, north=(0.9, 10), south=(0.99, 9))}
    assert best(run, back).round == 1
    other = best(run, {1: scored(0.5, north=(0.5, 10)), 2: scored(0.9, south=(0.9, 10))})
    assert (other.round, other.without) == (1, 0), "nothing in common: neither better nor worse"


def test_a_resumed_run_compares_as_the_uninterrupted_one(make_run: Any) -> None:
    from quorate.server.rounds.checkpoint import Progress

    run = make_run(federation={"rounds": 9})
    standing = best(run, {1: scored(0.6, north=(0.9, 10), south=(0.3, 10))})
    fields = {
        "run_id": "r",
        "config_hash": "c",
        "round": 1,
        "best_round": standing.round,
        "best_value": standing.value,
        "best_sites": dict(standing.sites),
        "initial_hash": "i",
        "sites": {},
        "metrics": RoundMetrics(round=1, train={}),
        "record": RoundRecord(
            round=1, cohort=(), weights={}, num_examples={}, num_steps={}, update_norms={}, excluded={},
            bytes_down={}, bytes_up={}, seconds={}, state_hash="s",
        ),
    }  # fmt: skip
    read = Progress.model_validate_json(Progress.model_validate(fields).model_dump_json())
    assert read.best == standing


def test_pauses_are_as_documented() -> None:
    assert FIRST_PAUSE == 30 and LONGEST_PAUSE == 600


# --- Sites that are slow, and no worse for it


class Slow(Tampered):
    """A grid on which every question takes its time, one after the other at each site.

    Args:
        seconds: site -> phase -> seconds; an identical question is answered at once.
    """

    def __init__(self, site: Site, clock: clocks.Clock, seconds: Mapping[str, Mapping[str, float]]) -> None:
        super().__init__(site, lambda update: update)
        self.clock, self.seconds = clock, seconds
        self.held_back: list[Message] = []
        self.due: dict[str, float] = {}
        self.free: dict[str, float] = {}
        self.worked: set[tuple[Any, ...]] = set()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = list(messages)
        ids = list(super().push_messages(pushed))
        for request, message, each in zip(self.requests[-len(pushed) :], pushed, ids, strict=True):
            site, header = NAMES[message.metadata.dst_node_id], request.header
            work = (site, header.phase, header.round, header.split, request.arrays.content_hash)
            takes = 0 if work in self.worked else self.seconds.get(site, {}).get(header.phase, 1)
            self.worked.add(work)
            self.free[site] = max(self.free.get(site, 0.0), self.clock.waited) + takes
            self.due[each] = self.free[site]
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        held = [*self.held_back, *super().pull_messages(wanted)]
        ids = [message.metadata.reply_to_message_id for message in held]
        here = [each in wanted and self.due[each] <= self.clock.waited for each in ids]
        self.held_back = [message for message, out in zip(held, here, strict=True) if not out]
        return [message for message, out in zip(held, here, strict=True) if out]


def test_an_evaluation_that_takes_as_long_as_the_training_is_waited_for(
    make_run: Any, make_sites: Any, tmp_path: Path, clock: clocks.Clock
) -> None:
    site, run = opened(make_run, make_sites, tmp_path, federation={"rounds": 3, "quorum": 1})
    fast, slow = {"fit": 40, "evaluate": 1}, {"fit": 70, "evaluate": 100}
    result = run_rounds(Slow(site, clock, {"north": fast, "west": fast, "south": slow}), run, NAMES)
    measured = read_jsonl(run.output_dir / METRICS_FILE, RoundMetrics)
    assert all(set(each.validation.sites) == set(SIZES) for each in measured)
    assert all(set(each.weights) == set(SIZES) for each in records(run))
    assert result.members.pace >= 100


def test_a_site_at_work_on_what_the_run_can_do_without_is_not_away(
    make_run: Any, make_sites: Any, tmp_path: Path, clock: clocks.Clock
) -> None:
    """It still trains; grace is waited for it."""
    site, run = opened(make_run, make_sites, tmp_path, federation={"rounds": 3, "quorum": 1})
    slow = {"fit": 20, "evaluate": 100}
    fast = {"fit": 20, "evaluate": 1}
    run_rounds(Slow(site, clock, {"north": fast, "west": fast, "south": slow}), run, NAMES)
    assert all(set(each.weights) == set(SIZES) for each in records(run))


def test_a_site_without_rows_of_a_split_is_not_asked_and_ends_no_waiting(
    make_run: Any, make_sites: Any, tmp_path: Path, clock: clocks.Clock
) -> None:
    rows = make_sites(**SIZES)
    rows["north"]["validation"] = []
    site = Site(rows)
    federation = {**FEDERATION, "rounds": 2, "quorum": 1}
    run = Run.open(site.prepare(make_run(federation=federation)), tmp_path / "out")
    slow = {"fit": 20, "evaluate": 100}
    grid = Slow(site, clock, {"south": slow, "west": slow})
    run_rounds(grid, run, NAMES)
    measured = read_jsonl(run.output_dir / METRICS_FILE, RoundMetrics)
    assert all(set(each.validation.sites) == {"south", "west"} for each in measured)
    assert not [r for r in grid.requests if r.header.phase == "evaluate" and r.header.site == "north"]


def test_an_error_is_no_sign_that_the_work_is_done(
    make_run: Any, make_sites: Any, tmp_path: Path, clock: clocks.Clock
) -> None:
    site, run = opened(make_run, make_sites, tmp_path, federation={"quorum": 1})
    grid = Slow(site, clock, {"south": {"evaluate": 200}, "west": {"evaluate": 200}})
    grid.change = only("north", lambda update: edited(update, error="data"), "evaluate")
    run_rounds(grid, run, NAMES)
    (measured,) = read_jsonl(run.output_dir / METRICS_FILE, RoundMetrics)
    assert set(measured.validation.sites) == {"south", "west"}


@pytest.mark.parametrize("privacy", ["none", "client"])
def test_a_site_that_loads_its_model_for_long_joins(
    make_run: Any, make_sites: Any, tmp_path: Path, clock: clocks.Clock, privacy: str
) -> None:
    sections: dict[str, Any] = {"federation": {"quorum": 1}}
    if privacy == "client":
        sections["aggregation"] = {"name": "fedavg", "weighting": "uniform"}
        sections["privacy"] = {
            "unit": "client", "noise_multiplier": 0.5, "clipping_norm": 0.1, "delta": 1e-3
        }  # fmt: skip
        sections["federation"] = {"quorum": 2}
    site, run = opened(make_run, make_sites, tmp_path, **sections)
    loads = 1000 if privacy == "client" else 300
    result = run_rounds(Slow(site, clock, {"south": {"join": loads}}), run, NAMES)
    assert set(result.members.nodes) == set(SIZES) and not result.members.refused


def test_with_everybody_away_what_the_run_can_do_without_ends_soon(
    make_run: Any, make_sites: Any, tmp_path: Path, clock: clocks.Clock
) -> None:
    gone = False
    site, run = opened(make_run, make_sites, tmp_path, evaluation={"references": ["local_only"]})
    grid = Tampered(site, lambda update: None if gone else update)
    result = run_rounds(grid, run, NAMES)
    gone, before = True, clock.waited
    result.members.presence.missed(dict.fromkeys(NAMES, 0.0), {})
    assert complete_run(grid, run, result).status == "done"
    patience = FEDERATION["grace_seconds"] + FEDERATION["reask_seconds"]
    assert clock.waited - before <= 4 * (patience + 5)  # the test, its best round, the reference, delivery


# --- Sites that join late, and people who have not given their word


@pytest.mark.parametrize("says", ["unreachable", "policy-approval"])
def test_a_latecomer_that_cannot_join_yet_is_asked_again(
    make_run: Any, make_sites: Any, tmp_path: Path, clock: clocks.Clock, says: str
) -> None:
    """Listed all the time; it could not be reached at the join, and has the word of its people only later."""
    federation = {"rounds": 8, "quorum": 1, "reask_seconds": 30}
    site, run = opened(make_run, make_sites, tmp_path, federation=federation)
    joins: list[float] = []

    def change(update: Update) -> Update | Error:
        header = update.header
        if header.site == "north" and header.phase == "fit":
            clock.sleep(120)
        if header.site == "south" and header.phase == "join":
            joins.append(clock.waited)
            if clock.waited < (300 if says == "unreachable" else 120):
                return Error(3, "ClientApp raised an exception")
            if clock.waited < 400:
                return edited(update, error="policy-approval")
        return update

    result = run_rounds(Tampered(site, change), run, NAMES)
    assert "south" in result.members.nodes and not result.members.refused, joins
    assert "south" in records(run)[-1].weights
    assert not result.members.late


def test_sites_that_wait_for_approval_count_for_the_patience_of_the_join(
    make_run: Any, make_sites: Any, tmp_path: Path, clock: clocks.Clock
) -> None:
    site, run = opened(make_run, make_sites, tmp_path)
    asked_again = []

    def change(update: Update) -> Update | None:
        if update.header.phase != "join":
            return update
        if update.header.site == "south":
            return None
        if clock.waited < 400:
            return edited(update, error="policy-approval")
        asked_again.append(clock.waited)
        return update

    result = run_rounds(Tampered(site, change), run, NAMES)
    assert set(result.members.nodes) == {"north", "west"}
    assert max(asked_again[:2]) < 460, "not after the timeout"


def test_a_site_that_falls_silent_while_it_waits_for_approval_costs_no_timeout(
    make_run: Any, make_sites: Any, tmp_path: Path, clock: clocks.Clock
) -> None:
    federation = {"approval_seconds": 120, "quorum": 1}
    site, run = opened(make_run, make_sites, tmp_path, federation=federation)

    def change(update: Update) -> Update | None:
        if update.header.site != "south":
            return update
        waits = update.header.phase == "join" and clock.waited < 10
        return edited(update, error="policy-approval") if waits else None

    run_rounds(Tampered(site, change), run, NAMES)
    assert clock.waited < 120 + 60


def test_stopping_early_may_hang_on_a_site_that_is_late(
    make_run: Any, make_sites: Any, tmp_path: Path, clock: clocks.Clock
) -> None:
    rows = make_sites(**SIZES)
    for name in ("north", "west"):
        rows[name]["validation"] = []
    site = Site(rows)
    settings = make_run(federation={**FEDERATION, "rounds": 2}, evaluation={"early_stopping_patience": 2})
    run = Run.open(site.prepare(settings), tmp_path / "out")
    result = run_rounds(Tampered(site, only("south", lambda _: None, "join")), run, NAMES)
    assert result.status == "done"
