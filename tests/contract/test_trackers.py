"""One contract for every tracker: it takes a whole run, a resumed one, and one that ends early."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from refusals import refuses
from report_data import TIMEOUT, Shape, config, make_summary, record, round_metrics
from rich.console import Console

from quorate.deploy.console import ConsoleTracker
from quorate.deploy.control.follower import Follower
from quorate.server.tracking.events import (
    EVENTS_FILE,
    Event,
    EventsTracker,
    Finished,
    LogMessage,
    PhaseBegan,
    Refused,
    RoundDone,
    Started,
    Tracker,
    Waiting,
)
from quorate.server.tracking.trackers import TENSORBOARD_DIR, TensorboardTracker, configured_trackers
from quorate.shared.errors import ConfigError

SHAPE = Shape(rounds=4, planned=4)
RUN = config(SHAPE)
ROUNDS = [(record(SHAPE, r), round_metrics(RUN, SHAPE, r)) for r in range(1, 5)]
SUMMARY = make_summary(RUN, SHAPE, *map(list, zip(*ROUNDS, strict=True)))


def function(event: Event) -> None:
    assert event.version == 1


TRACKERS: dict[str, Callable[[Path], Tracker]] = {
    "tensorboard": lambda _: TensorboardTracker(),
    "console": lambda _: ConsoleTracker(Console(file=StringIO())),
    "follower": lambda _: Follower(Console(file=StringIO())),
    "file": lambda folder: EventsTracker(folder / EVENTS_FILE),
    "function": lambda _: function,
}


@pytest.fixture(params=sorted(TRACKERS))
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Tracker]:
    if request.param == "tensorboard":
        pytest.importorskip("tensorboard", reason="needs the extra `tensorboard`")
    return lambda: TRACKERS[request.param](tmp_path)


def start(folder: Path, last: int) -> Started:
    sites = SUMMARY.sites
    return Started(run=RUN, run_id=SUMMARY.run_id, output_dir=str(folder), sites=sites, resumed_from=last)


def drive(tracker: Tracker, folder: Path, first: int = 1, last: int = 4) -> None:
    """Tell a tracker what the round loop does, for rounds `first` to `last`."""
    tracker(PhaseBegan(round=0, name="join"))
    tracker(Refused(sites={"away": TIMEOUT}))
    tracker(start(folder, first - 1))
    for done, metrics in ROUNDS[first - 1 : last]:
        for phase in ("cohort", "train", "aggregate", "evaluate", "checkpoint"):
            tracker(PhaseBegan(round=done.round, name=phase))
            tracker(Waiting(sites={"heart": 10.0}))
        tracker(LogMessage(level=logging.WARNING, logger="quorate", text="a warning"))
        tracker(RoundDone(record=done, metrics=metrics))


def test_it_takes_a_whole_run_and_can_be_used_for_the_next(
    make: Callable[[], Tracker], tmp_path: Path
) -> None:
    tracker = make()
    for folder in (tmp_path / "one", tmp_path / "two"):
        drive(tracker, folder)
        tracker(PhaseBegan(round=4, name="test"))
        tracker(PhaseBegan(round=4, name="outputs"))
        tracker(Finished(summary=SUMMARY))


def test_it_takes_a_resumed_run(make: Callable[[], Tracker], tmp_path: Path) -> None:
    drive(make(), tmp_path, last=2)
    tracker = make()
    drive(tracker, tmp_path, first=3)
    tracker(Finished(summary=SUMMARY))


def test_it_takes_an_end_before_any_round(make: Callable[[], Tracker], tmp_path: Path) -> None:
    tracker = make()
    tracker(PhaseBegan(round=0, name="join"))
    nothing = {"status": "quorum-not-met", "best": None, "final": None}
    tracker(Finished(summary=SUMMARY.model_copy(update=nothing)))


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / TENSORBOARD_DIR), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_back_what_was_recorded(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra `tensorboard`")
    tracker = TensorboardTracker()
    drive(tracker, tmp_path)
    tracker(Finished(summary=SUMMARY))
    found = scalars(tmp_path)
    for done, metrics in ROUNDS:
        validation = metrics.validation
        expected = {
            "validation/pooled/accuracy": validation.pooled["accuracy"],
            "validation/mean/macro_f1": validation.mean["macro_f1"],
            "validation/sites/heart/accuracy": validation.sites["heart"]["accuracy"],
            "train/cancer/train_loss": metrics.train["cancer"]["train_loss"],
            "traffic/bytes_up": sum(done.bytes_up.values()),
            "traffic/bytes_down": sum(done.bytes_down.values()),
            "seconds/train": done.seconds["train"],
            "sites/counted": len(done.weights),
        }
        assert {tag: found[tag][done.round] for tag in expected} == pytest.approx(expected, rel=1e-6)
    test = SUMMARY.best.test.pooled["macro_f1"]
    assert found["test/pooled/macro_f1"] == pytest.approx({SUMMARY.best.round: test}, rel=1e-6)


def test_tensorboard_purges_rounds_that_are_run_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra `tensorboard`")
    drive(TensorboardTracker(), tmp_path, last=3)  # killed after round 3 was told, before it was checkpointed
    assert list(scalars(tmp_path)["seconds/train"]) == [1, 2, 3]
    tracker = TensorboardTracker()
    tracker(start(tmp_path, 2))
    assert list(scalars(tmp_path)["seconds/train"]) == [1, 2]
    for done, metrics in ROUNDS[2:]:
        tracker(RoundDone(record=done, metrics=metrics))
    assert list(scalars(tmp_path)["seconds/train"]) == [1, 2, 3, 4]


def test_report_to_names_the_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert configured_trackers(RUN) == []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)  # as if it could not be imported
    with refuses(ConfigError, where="report_to") as caught:
        configured_trackers(RUN.model_copy(update={"report_to": ("tensorboard",)}))
    assert "`pip install 'quorate[tensorboard]'`" in str(caught.value)
