"""The round loop over grids on which one site drops, delays or spoils what it sends."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message
from hypothesis import given
from hypothesis import strategies as st

from quorate.client.flower import unwrap, wrap
from quorate.client.site import Site
from quorate.server import collect
from quorate.server.checkpoint import list_checkpoints, load_checkpoint
from quorate.server.checks import check_trained
from quorate.server.collect import Answers
from quorate.server.joining import Members
from quorate.server.records import RoundMetrics, RoundRecord
from quorate.server.rounds import Result, choose_cohort, run_rounds
from quorate.server.run import METRICS_FILE, RECORD_FILE, Run, read_jsonl
from quorate.shared.adapter import LORA_A, LORA_B, Adapter, is_lora_a, lora_layers
from quorate.shared.aggregation.base import RESIDUAL_A, RESIDUAL_B
from quorate.shared.errors import NonFiniteUpdate, QuorumNotMet
from quorate.shared.messages import RequestHeader, RoundRequest, Update
from quorate.shared.model import load_model
from quorate.shared.versions import versions
from quorate.simulations.grid import InProcessGrid

Change = Callable[[Update], Update | bytes | Error | None]
SIZES = {"north": 12, "south": 7, "west": 5}
NAMES = {1001: "north", 1002: "south", 1003: "west"}


class Tampered(InProcessGrid):
    """A grid on which `change` puts something in the place of each update, or nothing (None).

    Args:
        late: site -> pulls for which its updates to training are held back.
    """

    def __init__(self, site: Site, change: Change, late: dict[str, int] | None = None) -> None:
        super().__init__(site, site.names)
        self.change, self.late = change, late or {}
        self.asked: dict[str, Message] = {}
        self.requests: list[RoundRequest] = []
        self.updates: list[Update] = []
        self.held: list[tuple[int, Message]] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = list(messages)
        ids = list(super().push_messages(pushed))
        self.asked.update(zip(ids, pushed, strict=True))
        self.requests += [RoundRequest.decode(unwrap(message.content)) for message in pushed]
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.held = [(pulls - 1, message) for pulls, message in self.held]
        out = [message for pulls, message in self.held if pulls <= 0]
        self.held = [(pulls, message) for pulls, message in self.held if pulls > 0]
        for message in super().pull_messages(message_ids):
            update = Update.decode(unwrap(message.content))
            self.updates.append(update)
            changed = self.change(update)
            if changed is None:
                continue
            if isinstance(changed, Error):
                message = Message(changed, reply_to=self.asked[message.metadata.reply_to_message_id])
            else:
                message.content = wrap(changed if isinstance(changed, bytes) else changed.encoded)
            if update.header.phase == "fit" and self.late.get(update.header.site):
                self.held.append((self.late[update.header.site], message))
            else:
                out.append(message)
        return out


def edited(update: Update, arrays: Adapter | None = None, **header: Any) -> Update:
    """The update as a site that does not check itself would send it."""
    return Update(
        update.header.model_copy(update=header), update.arrays if arrays is None else Adapter(arrays)
    )


def described(update: Update, **fields: Any) -> Update:
    """The answer to `join` of a site that says something else of itself."""
    assert update.header.description is not None
    return edited(update, description=update.header.description.model_copy(update=fields))


def only(site: str, change: Change, phase: str = "fit", round: int | None = None) -> Change:
    """Apply `change` to one site's updates alone."""

    def pick(update: Update) -> Update | bytes | Error | None:
        header = update.header
        hit = header.site == site and header.phase == phase and round in (None, header.round)
        return change(update) if hit else update

    return pick


def untouched(update: Update) -> Update:
    return update


@pytest.fixture
def play(make_run: Any, make_sites: Any, tmp_path: Path) -> Any:
    """Run rounds over a tampered grid; returns the result, the records and the grid."""

    def run_it(
        change: Change = untouched,
        *,
        sites: dict[str, int] | None = None,
        rows: Any = None,
        late: dict[str, int] | None = None,
        out: str = "out",
        names: dict[int, str] | None = None,
        **sections: Any,
    ) -> tuple[Result, list[Any], Tampered, Run]:
        site = Site(rows or make_sites(**(sites or SIZES)))
        sections["federation"] = {"rounds": 1, **sections.get("federation", {})}
        run = Run.open(site.prepare(make_run(**sections)), tmp_path / out)
        grid = Tampered(site, change, late)
        result = run_rounds(grid, run, names)
        return result, read_jsonl(run.output_dir / RECORD_FILE, RoundRecord), grid, run

    return run_it


def spoiled(update: Update) -> Update:
    return edited(update, update.arrays.map(lambda _, array: np.full_like(array, np.nan)))


def infinite(update: Update) -> Update:
    name = next(iter(update.arrays))
    array = update.arrays[name].copy()
    array.flat[-1] = np.inf
    return edited(update, update.arrays.updated({name: array}))


def transposed(update: Update) -> Update:
    name = next(name for name in update.arrays if is_lora_a(name))
    return edited(update, update.arrays.updated({name: update.arrays[name].T.copy()}))


def without_one(update: Update) -> Update:
    return edited(update, update.arrays.subset(list(update.arrays)[1:]))


def with_one_more(update: Update) -> Update:
    return edited(update, update.arrays.updated({"mine.lora_A.weight": np.ones((1, 1), np.float32)}))


BAD = {
    "nan": (spoiled, "non-finite", "array .* holds NaN or infinity"),
    "one-infinity": (infinite, "non-finite", "array .* holds NaN or infinity"),
    "wrong-shape": (transposed, "adapter", r"has shape \[32, 4\]; expected \[4, 32\]"),
    "missing-array": (without_one, "adapter", "is missing"),
    "stray-array": (with_one_more, "adapter", "not part of this run's adapter"),
    "no-arrays": (lambda u: edited(u, Adapter({})), "adapter", "is missing"),
    "truncated": (lambda u: u.encoded[:-9], "protocol", "not an answer"),
    "rubbish": (lambda u: b"oops", "protocol", "not an answer"),
    "config": (lambda u: edited(u, config_hash="0" * 64), "config", "another run configuration"),
    "round": (lambda u: edited(u, round=7), "protocol", "answered round 7; asked was 1"),
    "run": (lambda u: edited(u, run_id="old"), "protocol", "answered run_id 'old'"),
    "phase": (lambda u: edited(u, phase="evaluate"), "protocol", "answered phase"),
    "site": (lambda u: edited(u, site="north"), "protocol", "answered for site 'north'; asked was 'south'"),
    "start": (lambda u: edited(u, input_hash="0" * 64), "protocol", "other arrays than it was sent"),
    "no-rows": (lambda u: edited(u, num_examples=0), "protocol", "trained on no rows"),
    "all-the-weight": (
        lambda u: edited(u, num_examples=2**53),
        "protocol",
        "answered for 9007199254740992 rows; the site joined with 7",
    ),
    "figure": (lambda u: edited(u, metrics={"train_loss": 1.7e308}), "non-finite", "a training figure"),
    "figure-name": (lambda u: edited(u, metrics={"\x1b[2J": 1.0}), "protocol", "not an answer"),
    "too-many-rows": (lambda u: edited(u, num_examples=10**400), "protocol", "not an answer"),
    "data": (lambda u: edited(u, Adapter({}), error="data"), "data", "could not use its own data"),
    "internal": (lambda u: edited(u, Adapter({}), error="internal"), "internal", "its log says why"),
    "client-app": (lambda u: Error(1001, "refused"), "refused", "which rule"),
    "flower": (lambda u: Error(3, "KeyError: 'a row'"), "unreachable", "Flower"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_update_is_set_aside_named_and_recorded(play: Any, kind: str) -> None:
    change, code, reason = BAD[kind]
    result, records, _, _ = play(only("south", change))
    assert result.status == "done" and len(records) == 1
    (record,) = records
    assert list(record.excluded) == ["south"] and record.excluded["south"].code == code
    assert re.search(reason, record.excluded["south"].reason), record.excluded["south"].reason
    assert "a row" not in record.excluded["south"].reason
    assert record.weights == pytest.approx({"north": 12 / 17, "west": 5 / 17})
    assert record.num_examples == {"north": 12, "west": 5}
    assert set(record.update_norms) == set(record.num_steps) == {"north", "west"}
    assert record.cohort == ("north", "south", "west")


def test_an_array_name_from_a_site_cannot_steer_a_terminal(play: Any) -> None:
    name = "\x1b[2J\n" + "x" * 10_000
    _, (record,), _, _ = play(
        only("south", lambda u: edited(u, u.arrays.updated({name: np.ones(1, np.float32)})))
    )
    reason = record.excluded["south"].reason
    assert "not part of this run's adapter" in reason and reason.isprintable() and len(reason) < 300


def test_a_move_beyond_float32_is_set_aside() -> None:
    """A round with an infinite norm in its record could not be read back."""
    start, end = (Adapter({"a": np.full(2, value, np.float32)}) for value in (-3e38, 3e38))
    request = RoundRequest(
        RequestHeader(run_id="r", round=1, phase="fit", site="s", run_config="{}", config_hash="0" * 64)
    )
    with pytest.raises(NonFiniteUpdate, match="further than float32"):
        check_trained(Update.reply(request, end, num_examples=5), end.schema, start, 5, None)


def test_what_is_set_aside_leaves_no_trace_in_the_model(play: Any) -> None:
    sgd = {"training": {"optim": "sgd", "learning_rate": 0.1}}  # AdamW magnifies the last bit of a gradient
    spoilt, *_ = play(only("south", spoiled), out="spoilt", **sgd)
    whole, _, grid, _ = play(out="whole", **sgd)
    assert spoilt.state.adapter.minus(whole.state.adapter).l2_norm > 1e-3, "south would have mattered"
    kept = [u for u in grid.updates if u.header.phase == "fit" and u.header.site != "south"]
    counts = [update.header.num_examples for update in kept]
    for name, array in spoilt.state.adapter.items():
        mean = sum(n * u.arrays[name].astype(np.float64) for n, u in zip(counts, kept, strict=True))
        np.testing.assert_allclose(array, mean / sum(counts), atol=1e-6)


def test_a_site_that_diverges_fails_alone(play: Any, make_sites: Any) -> None:
    """Only south has the label whose weight overflows; it trains in one stack with the others."""
    rows = make_sites(**SIZES)
    for name in ("north", "west"):
        rows[name]["train"] = [row for row in rows[name]["train"] if row.values["label"] != 2]
    assert any(row.values["label"] == 2 for row in rows["south"]["train"])
    result, (record,), _, _ = play(rows=rows, task={"class_weights": (1.0, 1.0, 3e38)})
    assert {site: why.code for site, why in record.excluded.items()} == {"south": "non-finite"}
    assert set(record.weights) == {"north", "west"}
    result.state.adapter.check_finite()


def test_a_norm_bound_sets_aside_what_moved_too_far(play: Any) -> None:
    def shove(update: Update) -> Update:
        return edited(update, update.arrays.map(lambda _, array: array + np.float32(3)))

    _, (record,), _, _ = play(only("west", shove), federation={"max_update_norm": 20.0})
    assert record.excluded["west"].code == "norm"
    assert "max_update_norm allows 20" in record.excluded["west"].reason
    assert all(0 < norm <= 20 for norm in record.update_norms.values()) and len(record.update_norms) == 2
    result, records, _, _ = play(out="tight", federation={"max_update_norm": 1e-6})
    assert isinstance(result.stopped, QuorumNotMet) and records == []


def test_without_a_quorum_the_run_stops_and_keeps_its_last_good_round(play: Any) -> None:
    result, records, _, run = play(
        only("south", spoiled, round=2), federation={"rounds": 3, "quorum": 3}, evaluation={"every": 1}
    )
    assert result.status == "quorum-not-met" and isinstance(result.stopped, QuorumNotMet)
    said = str(result.stopped)
    assert "round 2 needs 3 of 3 sites, 2 gave a good update (south: array" in said and "--resume" in said
    assert list_checkpoints(run.output_dir) == [1] and [record.round for record in records] == [1]
    state, progress = load_checkpoint(run.output_dir, 1)
    assert state.pack().content_hash == result.state.pack().content_hash == records[0].state_hash
    assert result.progress == progress


def test_an_interrupt_keeps_what_finished(play: Any) -> None:
    def interrupt(update: Update) -> Update:
        raise KeyboardInterrupt

    result, records, _, run = play(only("north", interrupt, round=2), federation={"rounds": 3})
    assert result.status == "interrupted" and isinstance(result.stopped, KeyboardInterrupt)
    assert list_checkpoints(run.output_dir) == [1] and len(records) == 1


def test_a_site_that_claims_a_name_twice_is_refused_under_it(play: Any) -> None:
    result, (record,), _, _ = play(only("south", lambda u: edited(u, site="north"), "join"))
    assert set(result.members.nodes) == {"west"} == set(record.cohort)
    why = result.members.refused["north"]
    assert why.code == "refused" and "2 nodes call themselves by this name" in why.reason
    with pytest.raises(QuorumNotMet, match="the run needs 2 sites, 1 of 3 can take part") as raised:
        play(only("south", lambda u: edited(u, site="north"), "join"), federation={"quorum": 2}, out="quorum")
    assert "north: 2 nodes call themselves" in str(raised.value)


@pytest.mark.parametrize(
    ("change", "code", "reason"),
    [
        (lambda u: edited(u, site="../south"), "protocol", "joined under a name"),
        (lambda u: edited(u, description=None), "protocol", "without a description"),
        (lambda u: edited(u, Adapter({}), error="data"), "data", "could not use its own data"),
        (spoiled, "non-finite", "holds NaN"),
        (lambda u: b"oops", "protocol", "not an answer"),
        (lambda u: described(u, label_counts={"mine": 10**400}), "protocol", "not an answer"),
        (lambda u: described(u, label_counts={"mine": 1}), "protocol", "other labels than the run lists"),
        (lambda u: described(u, rows={"train": -1}), "protocol", "not an answer"),
    ],
    ids=["name", "no-description", "data", "nan", "rubbish", "huge-count", "labels", "negative-rows"],
)
def test_a_site_that_cannot_join_is_named_by_its_node(
    play: Any, change: Change, code: str, reason: str
) -> None:
    result, (record,), _, _ = play(only("south", change, "join"))
    assert set(result.members.nodes) == {"north", "west"} == set(record.cohort)
    assert list(result.members.refused) == ["node 1002"]
    assert result.members.refused["node 1002"].code == code
    assert reason in result.members.refused["node 1002"].reason


def moved(update: Update) -> Update:
    return edited(update, update.arrays.map(lambda _, array: array + np.float32(1)))


def other_files(update: Update) -> Update:
    return described(update, model_files={"model.safetensors": "00"})


@pytest.mark.parametrize("change", [moved, other_files])
def test_a_site_with_another_base_is_refused(play: Any, change: Change) -> None:
    result, (record,), _, run = play(only("north", change, "join"))
    assert set(record.cohort) == {"south", "west"}
    assert result.members.refused["north"].code == "model"
    assert "another base model than most" in result.members.refused["north"].reason
    assert result.members.initial.content_hash == load_model(run.config).initial.content_hash


def test_of_two_bases_that_are_as_common_the_first_name_decides(play: Any) -> None:
    for late_site in ("north", "south"):
        result, *_ = play(only("south", moved, "join"), sites={"north": 5, "south": 5}, out=late_site)
        assert set(result.members.nodes) == {"north"}


def test_a_site_that_never_replies_costs_the_grace_and_no_more(play: Any) -> None:
    started = time.monotonic()
    _, (record,), _, _ = play(
        only("south", lambda u: None), federation={"quorum": 2, "grace_seconds": 0.3, "timeout_seconds": 60}
    )
    assert 0.3 <= time.monotonic() - started < 20
    assert record.excluded["south"].code == "timeout"
    assert record.excluded["south"].reason == "did not reply in time"
    assert set(record.weights) == {"north", "west"}


def test_a_site_within_the_grace_counts(play: Any) -> None:
    federation = {"quorum": 1, "grace_seconds": 30, "timeout_seconds": 60}
    _, (record,), _, _ = play(late={"south": 2}, federation=federation)
    assert set(record.weights) == set(SIZES) and record.excluded == {}


def test_what_has_arrived_counts_whatever_the_grace(play: Any) -> None:
    _, (record,), _, _ = play(federation={"quorum": 1, "grace_seconds": 0})
    assert set(record.weights) == set(SIZES) and record.excluded == {}


def test_the_timeout_ends_the_wait_for_a_quorum(play: Any) -> None:
    started = time.monotonic()
    result, records, _, _ = play(
        only("south", lambda u: None), federation={"quorum": 3, "grace_seconds": 60, "timeout_seconds": 0.4}
    )
    assert 0.4 <= time.monotonic() - started < 20
    assert isinstance(result.stopped, QuorumNotMet) and records == []
    assert "south: did not reply in time" in str(result.stopped)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"outcomes": None}, "without outcomes"),
        ({"num_examples": 5}, "another number of rows"),
        (
            {"num_examples": 2**53, "outcomes": {"values": ((0, 0),), "counts": (2**53,)}},
            "the site joined with 9",
        ),
        (
            {"outcomes": {"values": ((0, 0),), "counts": (9,), "loss_sum": 1.7e308}},
            "a loss or a sum that no evaluation gives",
        ),
        (
            {"outcomes": {"values": ((0, 0),), "counts": (9,), "sums": {"target": 1.7e308}}},
            "a loss or a sum that no evaluation gives",
        ),
        (
            {"outcomes": {"values": ((0, 0),), "counts": (2**70,), "num_rows": 9}},
            "counts that no evaluation gives",
        ),
        (
            {"outcomes": {"values": ((2**70, 0),), "counts": (9,)}},
            "counts that no evaluation gives",
        ),
        ({"outcomes": {"num_rows": 9}}, "not one per row"),
        ({"outcomes": {"values": ((99, 0),), "counts": (9,)}}, "as this task has them"),
        ({"outcomes": {"values": ((0,),), "counts": (9,)}}, "as this task has them"),
    ],
    ids=["none", "count", "rows", "loss", "sums", "huge", "huge-value", "no-outcomes", "label", "width"],
)
def test_an_impossible_evaluation_is_set_aside(play: Any, header: dict[str, Any], reason: str) -> None:
    def change(update: Update) -> Update:
        fields = {**update.header.model_dump(), **header}
        return Update(type(update.header).model_validate(fields))

    _, (record,), _, run = play(only("south", change, "evaluate"))
    assert record.excluded["south"].code == "protocol" and reason in record.excluded["south"].reason
    assert set(record.weights) == set(SIZES), "its training counted"
    (metrics,) = read_jsonl(run.output_dir / METRICS_FILE, RoundMetrics)
    assert metrics.validation.rows == {"north": 9, "west": 9}
    assert np.sum(metrics.validation.pooled["confusion"]) == 18


def test_why_training_failed_outlives_why_evaluation_failed(play: Any) -> None:
    def change(update: Update) -> Update:
        if update.header.site != "south" or update.header.phase == "join":
            return update
        return spoiled(update) if update.header.phase == "fit" else edited(update, error="internal")

    _, (record,), _, _ = play(change)
    assert record.excluded["south"].code == "non-finite"


def test_every_round_has_a_line_in_both_files(play: Any) -> None:
    result, records, grid, run = play(federation={"rounds": 3}, evaluation={"every": 2})
    metrics = read_jsonl(run.output_dir / METRICS_FILE, RoundMetrics)
    assert [r.round for r in records] == [m.round for m in metrics] == [1, 2, 3]
    assert [m.validation is not None for m in metrics] == [False, True, True], "every second, and the last"
    for record, line in zip(records, metrics, strict=True):
        assert sum(record.weights.values()) == pytest.approx(1.0)
        assert set(line.train) == set(SIZES) and all(
            np.isfinite(v["train_loss"]) for v in line.train.values()
        )
        assert {"cohort", "train", "aggregate", "evaluate", "checkpoint"} == set(record.seconds)
        assert record.num_steps == dict.fromkeys(SIZES, 3)
        down = Counter()
        for request in grid.requests:
            if request.header.round == record.round:
                down[request.header.site] += len(request.encoded)
        assert record.bytes_down == down
        up = Counter()
        for update in grid.updates:
            if update.header.round == record.round:
                up[update.header.site] += len(update.encoded)
        assert record.bytes_up == up
    assert records[-1].state_hash == result.state.pack().content_hash
    assert len({record.state_hash for record in records}) == 3


def test_weights_are_examples_or_uniform(play: Any) -> None:
    (record,) = play(out="examples")[1]
    assert record.weights == pytest.approx({name: size / 24 for name, size in SIZES.items()})
    (record,) = play(out="uniform", aggregation={"name": "fedavg", "weighting": "uniform"})[1]
    assert record.weights == pytest.approx(dict.fromkeys(SIZES, 1 / 3))


def test_cohorts_are_drawn_by_the_seed(play: Any, make_run: Any, tmp_path: Path) -> None:
    _, records, grid, run = play(federation={"rounds": 4, "sites_per_round": 2})
    names = {name: node for node, name in enumerate(SIZES)}
    members = Members(names, {}, Adapter({}))
    assert [record.cohort for record in records] == [choose_cohort(run, members, r) for r in (1, 2, 3, 4)]
    asked = {(r.header.round, r.header.site) for r in grid.requests if r.header.phase == "fit"}
    assert asked == {(record.round, site) for record in records for site in record.cohort}
    drawn = [choose_cohort(run, members, round) for round in range(1, 301)]
    assert all(len(set(cohort)) == 2 for cohort in drawn)
    counts = Counter(site for cohort in drawn for site in cohort)
    assert all(160 < counts[site] < 240 for site in SIZES), counts
    other = Run(make_run(seed=4, federation={"sites_per_round": 2}), tmp_path, "other")
    assert [choose_cohort(other, members, round) for round in range(1, 301)] != drawn
    everyone = Run(make_run(federation={"sites_per_round": 9}), tmp_path, "all")
    assert choose_cohort(everyone, members, 1) == tuple(sorted(SIZES))


def test_the_earlier_of_two_equal_rounds_is_the_best(play: Any) -> None:
    result, *_ = play(federation={"rounds": 3}, training={"learning_rate": 1e-20})
    assert result.progress is not None and result.progress.best_round == 1


def test_the_best_round_is_the_highest_of_its_metric(play: Any) -> None:
    result, _, _, run = play(
        federation={"rounds": 6},
        evaluation={"metric_for_best_model": "accuracy"},
        training={"learning_rate": 0.05},
    )
    values = [
        line.validation.pooled["accuracy"] for line in read_jsonl(run.output_dir / METRICS_FILE, RoundMetrics)
    ]
    assert len(set(values)) > 2, "the model must have learnt something"
    assert result.progress is not None and result.progress.best_value == max(values)
    assert result.progress.best_round == 1 + values.index(max(values))


def test_one_site_and_one_round_of_fedavg_is_plain_peft_training(
    play: Any, plain_peft_loop: Any, make_sites: Any
) -> None:
    sites = make_sites(north=17)
    result, _, _, run = play(rows=sites, training={"max_steps": None, "num_train_epochs": 2})
    initial = load_model(run.config).initial
    expected = plain_peft_loop(run.config, sites["north"]["train"], initial, 1)
    found = result.state.adapter
    assert found.minus(initial).l2_norm > 0.1
    assert max(float(np.abs(found[name] - expected[name]).max()) for name in expected) < 1e-5


def test_with_ffa_no_a_moves_and_none_travels(play: Any) -> None:
    result, records, grid, run = play(federation={"rounds": 3}, aggregation={"name": "ffa"})
    initial = load_model(run.config).initial
    for name, array in result.state.adapter.items():
        same = np.array_equal(array, initial[name])
        assert same == is_lora_a(name), name
    sent = [r for r in grid.requests if r.header.phase != "join"]
    came = [u for u in grid.updates if u.header.phase == "fit"]
    assert len(sent) == 18 and len(came) == 9
    for message in (*sent, *came):
        assert len(message.arrays) > 0
        assert not any(is_lora_a(name) for name in message.arrays)
    everything = play(out="fedavg", federation={"rounds": 3})[1]
    assert records[0].bytes_up["north"] < 0.8 * everything[0].bytes_up["north"]


def test_with_fedex_the_models_mean_is_exact_in_every_round(play: Any) -> None:
    result, _, grid, run = play(federation={"rounds": 3}, aggregation={"name": "fedex"}, save_total_limit=3)
    assert result.state.residual
    states = [load_checkpoint(run.output_dir, round)[0] for round in (1, 2, 3)]
    assert states[2].pack().content_hash == result.state.pack().content_hash
    for round in (2, 3):
        before, after = states[round - 2], states[round - 1]
        came = [u for u in grid.updates if u.header.phase == "fit" and u.header.round == round]
        total = sum(update.header.num_examples for update in came)
        missed = []
        for layer in lora_layers(after.adapter):
            wanted = product(before.residual, layer, RESIDUAL_B, RESIDUAL_A) + sum(
                update.header.num_examples / total * product(update.arrays, layer, LORA_B, LORA_A)
                for update in came
            )
            found = product(after.adapter, layer, LORA_B, LORA_A)
            old = product(before.residual, layer, RESIDUAL_B, RESIDUAL_A)
            missed.append(np.abs(found + old - wanted).max())
            found = found + product(after.residual, layer, RESIDUAL_B, RESIDUAL_A)
            np.testing.assert_allclose(found, wanted, atol=1e-6)
        assert max(missed) > 1e-4, "the residual must matter, or this test shows nothing"


def product(arrays: Adapter, layer: str, b: str, a: str) -> Any:
    return arrays[layer + b].astype(np.float64) @ arrays[layer + a].astype(np.float64)


def test_with_fedex_and_one_site_there_is_no_residual(play: Any) -> None:
    result, *_ = play(sites={"north": 12}, federation={"rounds": 3}, aggregation={"name": "fedex"})
    assert result.state.residual == {}
    plain, *_ = play(sites={"north": 12}, federation={"rounds": 3}, out="fedavg")
    assert plain.state.adapter.content_hash == result.state.adapter.content_hash


def answering(name: str) -> Callable[[Update], Update]:
    """An update under another site's name."""
    return lambda update: edited(update, site=name)


def test_a_site_answers_under_the_name_of_its_key_alone(play: Any) -> None:
    """Where the server knows nodes by their keys, whoever says another name is set aside."""
    result, *_ = play(names=NAMES)
    assert result.members.nodes == {"north": 1001, "south": 1002, "west": 1003}
    result, *_ = play(only("south", answering("west"), "join", 0), names=NAMES, out="other")
    assert set(result.members.nodes) == {"north", "west"}
    assert result.members.refused["south"].code == "protocol"
    assert "answered for site 'west'; asked was 'south'" in result.members.refused["south"].reason


def test_admitted_sites_that_are_not_connected_are_named(play: Any) -> None:
    names = {**NAMES, 7: "east"}
    result, *_ = play(names=names, federation={"quorum": 3})
    assert result.members.refused["east"].code == "absent"
    with pytest.raises(QuorumNotMet, match=r"3 of 4 can take part.*east: is not connected"):
        play(names=names, federation={"quorum": 4}, out="other")
    with pytest.raises(
        QuorumNotMet, match="0 of 1 can take part"
    ):  # a node without an admitted key is nobody
        play(names={7: "east"}, out="third")


def test_a_site_that_was_away_is_asked_again(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two errors of Flower's, then an answer: as if it had answered at once."""
    monkeypatch.setattr(collect, "_FIRST_REASK", 0.05)
    asked: Counter[str] = Counter()

    def away_twice(update: Update) -> Update | Error:
        asked[update.header.phase] += 1
        return Error(3, "node is not available") if asked[update.header.phase] < 3 else update

    change = only("south", away_twice)
    single = {"max_stack": 1}  # asked again, it trains without the others
    result, records, *_ = play(change, federation={"reask_seconds": 60, "quorum": 3}, training=single)
    alone, *_ = play(out="alone", training=single)
    assert asked["fit"] == 3 and not records[0].excluded
    assert result.state.adapter.content_hash == alone.state.adapter.content_hash


def test_asking_again_ends_with_its_time(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "_FIRST_REASK", 0.05)
    change = only("south", lambda _: Error(3, "node is not available"))
    _, records, *_ = play(change, federation={"reask_seconds": 0.2})
    assert records[0].excluded["south"].code == "unreachable"


@pytest.mark.parametrize("late", [{"north": 3}, {"north": 2, "south": 4}, {"west": 2}])
def test_sums_do_not_depend_on_who_is_first(play: Any, late: dict[str, int]) -> None:
    federation = {"grace_seconds": 60}
    result, *_ = play(late=late, federation=federation)
    punctual, *_ = play(out="punctual", federation=federation)
    assert result.state.adapter.content_hash == punctual.state.adapter.content_hash


@given(st.permutations(list("abcde")), st.sets(st.sampled_from("abcde")))
def test_in_order_keeps_the_order_and_loses_nobody(arrival: list[str], failing: set[str]) -> None:
    answers = Answers({}, quorum=1, timeout=1, grace=0)

    def arriving() -> Iterable[tuple[str, Any]]:
        for site in arrival:
            if site in failing:
                answers.excluded[site] = collect.exclusion("data")
            else:
                yield site, f"update of {site}"

    got = list(collect.in_order("abcde", answers, iter(arriving())))
    assert got == [(site, f"update of {site}") for site in "abcde" if site not in failing]


@pytest.mark.parametrize(
    ("name", "value", "fits"),
    [
        ("quorate", "0.1.7", True),
        ("quorate", "0.2.0", False),
        ("torch", "1.13.0", False),
        ("peft", "", False),
    ],
)
def test_releases_that_do_not_work_together_are_named(play: Any, name: str, value: str, fits: bool) -> None:
    def other(update: Update) -> Update:
        assert update.header.description is not None
        return described(update, versions={**update.header.description.versions, name: value})

    result, *_ = play(only("south", other, "join", 0), names=NAMES)
    assert ("south" in result.members.nodes) is fits
    if not fits:
        assert result.members.refused["south"].code == "version"
        assert f"{name} {value}" in result.members.refused["south"].reason


def test_a_site_refuses_a_server_of_another_release(make_run: Any, make_sites: Any) -> None:
    site = Site(make_sites(north=12))
    config = site.prepare(make_run())
    header = {"run_id": "r", "round": 0, "phase": "join", "site": "north"}
    header |= {"run_config": config.canonical_json(), "config_hash": config.content_hash}
    for theirs, error in ((versions(), None), ({**versions(), "quorate": "9.0"}, "version")):
        asked = RoundRequest(RequestHeader.model_validate({**header, "versions": theirs}))
        assert site.handle([asked])[0].header.error == error
