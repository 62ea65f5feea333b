"""Ctrl-C at any moment: the run finishes by writing what it has, and `--resume` goes on from there."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cli_forks import Ended, Point
from moments import PHASES, STEP, WRITES
from tiny_runs import ROUNDS, TinyRuns

from quorate.server.rounds.checkpoint import load_checkpoint
from quorate.shared.adapters.peft_export import as_lora

pytestmark = pytest.mark.slow

MOMENTS = (
    "train-1",
    "check-updates",
    "evaluate",
    "before-rename",
    "after-rename",
    "half-a-record",
    "half-a-removal",
    "test",
    "half-an-adapter",
    "before-the-report",
)


def check_interrupted(runs: TinyRuns, out: str, ended: Ended, finished: int) -> dict[str, Any]:
    """The outputs are those of the finished rounds, all of them; returns the summary."""
    folder = runs.folder / out
    assert ended.code == 130, ended.err
    assert ended.err.endswith("interrupted\n") and "Traceback" not in ended.err
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("interrupted", finished)
    for name in ("record.jsonl", "metrics.jsonl"):
        lines = (folder / name).read_text().splitlines()
        assert [json.loads(line)["round"] for line in lines] == list(range(1, finished + 1))
    assert (folder / "report.html").is_file()
    assert not [path.name for path in folder.rglob(".*")], "half-written files stay behind"
    assert (folder / "adapter").exists() == (finished > 0)
    if finished:
        state, _ = load_checkpoint(folder, summary["best"]["round"])
        adapter, _, _ = as_lora(state, 4, 16, False)
        assert (folder / "adapter/adapter_model.safetensors").read_bytes() == adapter.to_bytes()
    return summary


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_finished_rounds_gave_is_written(runs: TinyRuns, moment: str) -> None:
    point, finished = (PHASES | WRITES)[moment]
    out = f"interrupted-{moment}"
    check_interrupted(runs, out, runs.simulate("fedavg", out, at=point.interrupt()), finished)
    assert runs.simulate("fedavg", out, "--resume").code == 0
    runs.check_end("fedavg", out)


@pytest.mark.parametrize("phase", ["local only", "centralised"])
def test_figures_on_test_rows_outlive_the_references(runs: TinyRuns, phase: str) -> None:
    """Reference runs can take longer than the run itself: stopping them must not cost its result."""
    out = f"interrupted in {phase}"
    ended = runs.simulate("references", out, at=Point(STEP, 2, phase, nth=2).interrupt())
    summary = check_interrupted(runs, out, ended, ROUNDS)
    whole = runs.whole("references")["summary.json"]
    assert summary["final"] == whole["final"] and summary["best"] == whole["best"]
    assert summary["references"] is None
    assert runs.simulate("references", out, "--resume").code == 0
    runs.check_end("references", out)


def test_before_any_round_there_is_nothing_to_write(runs: TinyRuns) -> None:
    point, _ = PHASES["join"]
    ended = runs.simulate("fedavg", "interrupted-join", at=point.interrupt())
    assert ended.code == 130 and ended.err.endswith("interrupted\n") and "Traceback" not in ended.err
    assert runs.simulate("fedavg", "interrupted-join", "--resume").code == 0
    runs.check_end("fedavg", "interrupted-join")
