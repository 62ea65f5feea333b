"""Early stopping: when it stops, what it keeps, and that a stopped run stays stopped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from refusals import refuses

from quorate.server.rounds.best_round import BestRound
from quorate.server.rounds.run import METRICS_FILE, RECORD_FILE, read_jsonl
from quorate.server.tracking.records import Evaluation, RoundMetrics, RoundRecord
from quorate.shared.errors import ConfigError
from quorate.simulations.runner import SimulationOptions, simulate

SIZES = {"north": 12, "south": 7}


def scored(value: float | None, metric: str = "macro_f1") -> Evaluation:
    pooled = {} if value is None else {metric: value}
    return Evaluation(split="validation", pooled=pooled, mean={}, sites={}, rows={})


def play(run: Any, values: list[float | None], metric: str = "macro_f1") -> tuple[BestRound, int]:
    """The standing, and the round after which the run stops (the last one where it does not)."""
    standing = BestRound()
    for round, value in enumerate(values, start=1):
        standing = standing.after(run, round, scored(value, metric))
        if standing.stops(run, round):
            return standing, round
    return standing, len(values)


@pytest.mark.parametrize(
    ("evaluation", "values", "stop", "best"),
    [
        ({"early_stopping_patience": 2}, [0.1, 0.3, 0.2, 0.3, 0.9], 4, 2),
        ({"early_stopping_patience": 2}, [0.1, 0.2, 0.1, 0.3, 0.2, 0.1, 0.9], 6, 4),
        ({"early_stopping_patience": 1, "early_stopping_threshold": 0.05}, [0.1, 0.2, 0.24, 0.9], 3, 3),
        ({"early_stopping_patience": 2}, [0.1, None, None, None, 0.2], 5, 5),
        ({"early_stopping_patience": 2}, [0.1, math.nan, math.nan, 0.9], 3, 1),
        ({"early_stopping_patience": 1, "metric_for_best_model": "accuracy"}, [0.1] * 3, 3, None),
        ({}, [0.3, 0.2, 0.1, 0.1, 0.1], 5, 1),
    ],
    ids=["ties-are-none", "starts-again", "threshold", "unmeasured", "nan", "another-metric", "off"],
)
def test_it_stops_after_as_many_rounds_without_improvement(
    make_run: Any, evaluation: Any, values: list[float | None], stop: int, best: int | None
) -> None:
    run = make_run(evaluation=evaluation, federation={"rounds": 50})
    standing, last = play(run, values)
    assert (last, standing.round) == (stop, best)


def test_a_metric_of_which_less_is_better_stops_when_it_rises(make_run: Any) -> None:
    task = {"name": "sequence_regression", "max_length": 24}
    run = make_run(federation={"rounds": 9}).model_dump()
    run |= {"task": task, "evaluation": {"metric_for_best_model": "rmse", "early_stopping_patience": 2}}
    config = type(make_run()).model_validate(run)
    standing, last = play(config, [3.0, 2.0, 2.5, 2.1, 1.0], "rmse")
    assert (last, standing.round, standing.value) == (4, 2, 2.0)
    assert play(config, [3.0, 2.0, 1.5, 1.2, 1.0], "rmse")[0].round == 5


def test_transformers_callback_stops_at_the_same_round(make_run: Any) -> None:
    from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

    draws = [0.1, 0.2, 0.21, 0.4, 0.44, 0.39, 0.47, 0.48, 0.1, 0.48, 0.6, 0.61, 0.2, 0.3]
    for patience in (1, 2, 3):
        for threshold in (0.0, 0.05):
            run = make_run(
                evaluation={
                    "early_stopping_patience": patience,
                    "early_stopping_threshold": threshold,
                },
                federation={"rounds": 99},
            )
            args = TrainingArguments(metric_for_best_model="macro_f1", greater_is_better=True, report_to=[])
            state, control = TrainerState(), TrainerControl()
            callback = EarlyStoppingCallback(patience, threshold)
            theirs = len(draws)
            for round, value in enumerate(draws, start=1):
                callback.on_evaluate(args, state, control, metrics={"eval_macro_f1": value})
                if state.best_metric is None or value > state.best_metric:
                    state.best_metric = value
                if control.should_training_stop:
                    theirs = round
                    break
            assert play(run, draws)[1] == theirs, (patience, threshold)


def test_a_run_stops_cleanly_says_why_and_stays_stopped(
    make_run: Any, make_sites: Any, tmp_path: Path
) -> None:
    run = make_run(
        federation={"rounds": 6},
        training={"learning_rate": 1e-20},  # nothing moves, so nothing improves on round 1
        evaluation={"early_stopping_patience": 2},
    )
    summary = simulate(run, make_sites(**SIZES), tmp_path / "out")
    assert summary.status == "done" and summary.rounds == 3
    assert summary.best is not None and summary.best.round == 1 and summary.best.test is not None
    assert summary.stopped is not None
    assert summary.stopped.startswith("stopped early after round 3 of 6: for 2 evaluated rounds macro_f1 has")
    records = read_jsonl(tmp_path / "out" / RECORD_FILE, RoundRecord)
    assert [each.early_stop is None for each in records] == [True, True, False]  # type: ignore[union-attr]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Stopped early after round 3 of 6" in page and "(early stopping)" in page

    again = simulate(run, make_sites(**SIZES), tmp_path / "out", options=SimulationOptions(resume=True))
    assert again.rounds == 3 and again.stopped == summary.stopped
    assert len(read_jsonl(tmp_path / "out" / METRICS_FILE, RoundMetrics)) == 3


def test_a_run_that_is_cut_and_resumed_stops_where_the_uninterrupted_one_does(
    make_run: Any, make_sites: Any, tmp_path: Path
) -> None:
    import shutil

    run = make_run(
        federation={"rounds": 9},
        training={"learning_rate": 1e-20},
        evaluation={"early_stopping_patience": 3},
        save_total_limit=9,
    )
    whole = simulate(run, make_sites(**SIZES), tmp_path / "out")
    for round in (3, 4):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{round}")
    resumed = simulate(run, make_sites(**SIZES), tmp_path / "out", options=SimulationOptions(resume=True))
    assert (resumed.rounds, resumed.stopped) == (whole.rounds, whole.stopped) == (4, whole.stopped)


def test_without_validation_rows_it_is_refused(make_run: Any, make_sites: Any, tmp_path: Path) -> None:
    rows = {name: {**splits, "validation": []} for name, splits in make_sites(**SIZES).items()}
    with refuses(ConfigError, where="evaluation.early_stopping_patience"):
        simulate(make_run(evaluation={"early_stopping_patience": 1}), rows, tmp_path / "out")
