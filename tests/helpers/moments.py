"""Moments of a run of 3 rounds at which it is stopped, and how many rounds are finished by then."""

from __future__ import annotations

from cli_forks import Point

STEP = "quorate.client.trainer.fit:_Training.step"
MEASURE = "quorate.client.site.site:evaluate"
OPEN, APPEND = "quorate.shared.process.files:opened", "quorate.server.rounds.run:opened"
APPEND_EVENT, SHOW = "quorate.server.tracking.events:opened", "quorate.deploy.console:ConsoleTracker.__call__"
RENAME, REPLACE = "pathlib:Path.rename", "pathlib:Path.replace"

PHASES: dict[str, tuple[Point, int]] = {
    "join": (Point("quorate.client.site.site:Site._join", 0, "join", nth=2), 0),
    "train-1": (Point(STEP, 1, "train", nth=2), 0),
    "train-2": (Point(STEP, 2, "train", nth=2), 1),
    "check-updates": (Point("quorate.server.rounds.training:check_trained", 2, "train", nth=2), 1),
    "aggregate": (Point("quorate.shared.aggregation.rule:WeightedSum.mean", 2, "aggregate", when="after"), 1),
    "evaluate": (Point(MEASURE, 2, "evaluate", nth=2), 1),
    "before-rename": (Point(RENAME, 2, "checkpoint", file=".checkpoint-2.tmp"), 1),
    "after-rename": (Point(RENAME, 2, "checkpoint", file=".checkpoint-2.tmp", when="after"), 2),
    "half-a-record": (Point(APPEND, 2, "checkpoint", file="record.jsonl", when="torn"), 2),
    "train-3": (Point(STEP, 3, "train", nth=2), 2),
    "half-a-removal": (Point("os:unlink", 2, "checkpoint", when="after"), 2),
    "test": (Point(MEASURE, 3, "test", nth=2), 3),
    "half-an-adapter": (Point(OPEN, 3, "outputs", file="adapter_model.safetensors", when="torn"), 3),
}
"""At least one in each phase."""
RULE = ("train-1", "train-2", "check-updates", "aggregate", "evaluate", "after-rename", "train-3", "test")
"""Those of PHASES that another aggregation rule could change."""

WRITES: dict[str, tuple[Point, int]] = {
    "before-run-yaml": (Point(REPLACE, file=".run.yaml.tmp"), 0),
    "half-a-state": (Point(OPEN, 2, "checkpoint", file="state.safetensors", when="torn"), 1),
    "half-a-progress": (Point(OPEN, 2, "checkpoint", file="progress.json", when="torn"), 1),
    "between-the-lines": (Point(APPEND, 2, "checkpoint", file="metrics.jsonl"), 2),
    "half-the-metrics": (Point(APPEND, 2, "checkpoint", file="metrics.jsonl", when="torn"), 2),
    "half-an-event": (Point(APPEND_EVENT, 2, "checkpoint", nth=2, when="torn"), 2),
    "after-the-lines": (Point(SHOW, 2, "checkpoint", nth=2), 2),
    "last-rename": (Point(RENAME, 3, "checkpoint", file=".checkpoint-3.tmp", when="after"), 3),
    "last-record": (Point(APPEND, 3, "checkpoint", file="record.jsonl", when="torn"), 3),
    "before-the-adapter": (Point(RENAME, 3, "outputs", file=".adapter.tmp"), 3),
    "half-a-summary": (Point(OPEN, 3, "outputs", file=".summary.json.tmp", when="torn"), 3),
    "before-the-report": (Point(REPLACE, 3, "outputs", file=".report.html.tmp"), 3),
}
"""Files, which do not depend on the aggregation rule."""
