"""What a person sees of a run: plain lines or a live bar, and the table at the end."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from quorate.deploy import terminal
from quorate.deploy.console import ConsoleTracker
from quorate.deploy.results import print_results
from quorate.server.tracking.events import Finished, HeadSolved, PhaseBegan, RoundDone, Started
from quorate.server.tracking.records import (
    Evaluation,
    Exclusion,
    Measured,
    References,
    RoundMetrics,
    RoundRecord,
    SolvedHead,
    Summary,
)
from quorate.shared.config.run_config import RunConfig
from quorate.shared.progress import StepEvent
from quorate.shared.protocol.messages import SiteDescription

RUN = RunConfig.model_validate(
    {
        "name": "trial",
        "task": {"name": "sequence_classification", "labels": ["yes", "no"]},
        "data": "notes",
        "model": {"model_name_or_path": "base"},
        "federation": {"rounds": 5},
    }
)
TIMEOUT = Exclusion(code="timeout", reason="did not reply in time")


def site(*notes: str) -> SiteDescription:
    return SiteDescription(
        rows={"train": 10, "test": 5},
        label_counts={"yes": 5, "no": 5},
        model_files={},
        model_sha256="0" * 64,
        start_hash="ab" * 32,
        versions={},
        notes=notes,
    )


def start(sites: dict[str, SiteDescription], last: int = 0) -> Started:
    return Started(run=RUN, run_id="x", output_dir="out", sites=sites, resumed_from=last)


def evaluation(pooled: float, **sites: float) -> Evaluation:
    return Evaluation(
        split="test",
        pooled={"macro_f1": pooled, "confusion": [[1, 2], [3, 4]]},
        mean={"macro_f1": pooled},
        sites={name: {"macro_f1": value} for name, value in sites.items()},
        rows=dict.fromkeys(sites, 20),
        intervals={"pooled": {"macro_f1": [pooled - 0.1, pooled + 0.1]}},
    )


def record(round: int, **excluded: Exclusion) -> RoundRecord:
    return RoundRecord(
        round=round,
        cohort=("north", "south"),
        weights={"south": 1.0},
        num_examples={"south": 10},
        num_steps={"south": 2},
        update_norms={"south": 0.5},
        excluded=excluded,
        bytes_down={"south": 1},
        bytes_up={"south": 1},
        seconds={"train": 1.0, "evaluate": 0.5},
        state_hash="0" * 64,
    )


def metrics(round: int, value: float | None) -> RoundMetrics:
    return RoundMetrics(
        round=round,
        train={"south": {"train_loss": 0.25}},
        validation=None if value is None else evaluation(value, south=value),
    )


def summary(**fields: Any) -> Summary:
    base: dict[str, Any] = {
        "name": "trial",
        "run_id": "x",
        "status": "done",
        "rounds": 5,
        "metric": "macro_f1",
        "seed": 0,
        "config_hash": "0" * 64,
        "bytes": {"down": 1_000_000, "up": 500_000, "total": 1_500_000},
        "seconds": {"total": 12.4},
        "versions": {},
    }
    return Summary.model_validate({**base, **fields})


def two_rounds(tracker: ConsoleTracker) -> None:
    tracker(PhaseBegan(round=0, name="join"))
    tracker(start({"north": site(), "south": site("has no `no` [rows]")}, 3))
    for round in (4, 5):
        for phase in ("cohort", "train"):
            tracker(PhaseBegan(round=round, name=phase))
        tracker.step(StepEvent(("north", "south"), round, 2, 8, 0.5))
        for phase in ("aggregate", "evaluate", "checkpoint"):
            tracker(PhaseBegan(round=round, name=phase))
        late = {"north": TIMEOUT} if round == 4 else {}
        measured = metrics(round, 0.75 if round == 5 else None)
        tracker(RoundDone(record=record(round, **late), metrics=measured))
    tracker(PhaseBegan(round=5, name="test"))
    tracker(Finished(summary=summary()))
    tracker.close()
    tracker.close()


def printed(found: Summary, folder: Path = Path("out")) -> str:
    out = io.StringIO()
    print_results(Console(file=out, width=110), found, folder)
    return out.getvalue()


def cells(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip()]


def test_a_solved_head_is_a_line_that_says_from_whose_rows() -> None:
    head = SolvedHead(
        strength=0.03,
        validation_rows=40,
        slope=0.9,
        rows={"east": 900, "south": 100},
        excluded={"north": TIMEOUT},
        bytes_down={},
        bytes_up={"east": 2_400_000, "south": 2_400_000},
        seconds=12.34,
    )
    for shown, picked in (
        (head, "picked on 40 validation rows"),
        (head.model_copy(update={"validation_rows": 0}), "by default"),
    ):
        out = io.StringIO()
        ConsoleTracker(Console(file=out, width=200))(HeadSolved(head=shown))
        assert out.getvalue().splitlines() == [
            f"head solved from sums of 2 sites (1000 rows) · ridge 0.03 {picked} · 4.8 MB came · 12.3 s",
            "  not in it: north: did not reply in time",
        ]


def test_words_of_a_site_cannot_steer_a_terminal() -> None:
    out = io.StringIO()
    ConsoleTracker(Console(file=out))(start({"north": site("\x1b[2J\nround 9/9")}))
    assert out.getvalue().splitlines()[-1] == "note: north:  [2J round 9/9"


def test_plain_lines() -> None:
    out = io.StringIO()
    tracker = ConsoleTracker(Console(file=out))
    two_rounds(tracker)
    assert out.getvalue().splitlines() == [
        "join",
        "trial: 5 rounds over 2 sites, going on after round 3, into out",
        "sites: north (15 rows), south (15 rows)",
        "note: south: has no `no` [rows]",
        "round 4/5 · train",
        "round 4/5 · evaluate",
        "round 4/5 · train loss 0.250 · 1 of 2 sites · 1.5 s",
        "  set aside: north: did not reply in time",
        "round 5/5 · train",
        "round 5/5 · evaluate",
        "round 5/5 · macro_f1 0.750 · train loss 0.250 · 1 of 2 sites · 1.5 s",
        "round 5/5 · test",
    ]


def test_quiet_says_nothing_and_keeps_the_summary() -> None:
    for terminal_like in (False, True):
        out = io.StringIO()
        tracker = ConsoleTracker(Console(file=out, force_terminal=terminal_like), quiet=True)
        two_rounds(tracker)
        assert out.getvalue() == "" and tracker.summary == summary()


def test_a_terminal_shows_steps_and_the_time_left_and_keeps_the_rounds() -> None:
    out = io.StringIO()
    tracker = ConsoleTracker(Console(file=out, force_terminal=True, highlight=False, width=110))
    two_rounds(tracker)
    text = out.getvalue()
    assert "\x1b[" in text
    assert "round 5/5 · macro_f1 0.750" in text and "set aside: north" in text

    out = io.StringIO()
    tracker = ConsoleTracker(Console(file=out, force_terminal=True, width=110))
    tracker(start({"a": site()}))
    tracker(PhaseBegan(round=1, name="train"))
    sites = ("a", "b", "c", "d", "e")
    tracker.step(StepEvent(sites, 1, 3, 8, 0.5))
    assert tracker._bar is not None
    (task,) = tracker._bar.tasks
    assert task.description == "round 1/5 · train"
    assert task.fields["detail"] == "a, b, c +2 · step 3/8 · loss 0.500"
    tracker(RoundDone(record=record(1), metrics=metrics(1, 0.5)))
    tracker.step(StepEvent(sites, 2, 1, 8, 0.4))
    assert task.completed == 1 and task.fields["detail"].endswith(" s left")
    tracker.close()


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "xterm", "NO_COLOR": "1"}])
def test_a_dumb_terminal_gets_plain_lines_and_no_color_none(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stderr", Terminal())
    console = terminal._console(stderr=True)
    console.print("[red]wrong[/red]")
    assert console.file.getvalue() == "wrong\n"  # type: ignore[attr-defined]
    assert console.is_terminal == (environment["TERM"] != "dumb")


def test_results_compare_each_site_with_the_references(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "report.html").touch()
    best = Measured(round=4, test=evaluation(0.8, north=0.81, south=0.79))
    alone = {
        "north": Measured(round=2, test=evaluation(0.5, north=0.6, south=0.4)),
        "south": Measured(round=2, test=evaluation(0.5, north=0.3, south=0.7)),
    }
    central = Measured(round=5, test=evaluation(0.9, north=0.92, south=0.88))
    references = References(local_only=alone, centralised=central)
    text = printed(summary(best=best, final=best, references=references), tmp_path)
    rows = cells(text)
    assert rows[0] == ["site", "rows", "federated", "local", "only", "centralised"]
    assert ["north", "20", "0.810", "0.600", "0.920"] in rows
    assert ["south", "20", "0.790", "0.700", "0.880"] in rows
    assert ["all", "sites", "40", "0.800", "0.900"] in rows
    assert "after round 4 of 5, 95 % interval over all sites 0.700 to 0.900" in text
    assert "1.5 MB" in text and "12 s" in text
    assert f"adapter  {tmp_path / 'adapter'}\n" in text and f"report   {tmp_path / 'report.html'}\n" in text


def test_results_of_runs_that_lack_something() -> None:
    best = Measured(round=4, test=evaluation(0.8, north=0.81))
    text = printed(summary(best=best))
    assert cells(text)[0] == ["site", "rows", "federated"] and "adapter" not in text

    final = Measured(round=2, validation=evaluation(0.7, north=0.7))
    excluded = {"south": {0: Exclusion(code="data", reason="no"), 2: TIMEOUT}}
    text = printed(
        summary(status="interrupted", best=Measured(round=1), final=final, rounds=2, excluded=excluded)
    )
    assert "last model by" not in text and "last model: after round 2 of 2" in text
    assert "set aside: south in round joining, 2 (data; timeout)" in text
    assert "interrupted; go on with --resume: 2 rounds" in text

    text = printed(summary(status="quorum-not-met", rounds=0))
    assert "no round was evaluated" in text and "too few sites" in text


def test_names_are_not_taken_for_markup() -> None:
    text = printed(summary(best=Measured(round=1, test=evaluation(0.5, **{"[red]x": 0.5}))))
    assert "[red]x" in text
