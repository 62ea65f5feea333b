"""Events: what trackers of a run are told, and what those of another process read of it in events.jsonl."""

from __future__ import annotations

import io
import json
import logging
import random
from pathlib import Path
from typing import Any, get_args

import pytest
from refusals import refuses
from report_data import TIMEOUT, Shape, config, make_summary, record, round_metrics
from rich.console import Console

from quorate.deploy.console import ConsoleTracker
from quorate.deploy.control.follower import Follower
from quorate.server.tracking.events import (
    Event,
    EventsReader,
    EventsTracker,
    Finished,
    LogMessage,
    PhaseBegan,
    Refused,
    RoundDone,
    Started,
    Tracker,
    follow,
    tell,
    telling_warnings,
)
from quorate.server.tracking.records import Record
from quorate.shared.errors import OutputError

SHAPE = Shape(rounds=3, planned=3)
RUN = config(SHAPE)
EVENTS = Path(__file__).parents[3] / "golden" / "events.jsonl"
KINDS: tuple[type[Record], ...] = get_args(get_args(Event)[0])
JOIN = PhaseBegan(round=0, name="join")
ROUNDS = [(record(SHAPE, r), round_metrics(RUN, SHAPE, r)) for r in range(1, 4)]
ROUNDS[1] = (ROUNDS[1][0].model_copy(update={"excluded": {"kidney": TIMEOUT}}), ROUNDS[1][1])
SUMMARY = make_summary(RUN, SHAPE, *map(list, zip(*ROUNDS, strict=True)))


def begin(tracker: Tracker, first: int) -> None:
    tracker(PhaseBegan(round=0, name="join"))
    tracker(Refused(sites={"away": TIMEOUT}))
    tracker(
        Started(run=RUN, run_id=SUMMARY.run_id, output_dir="out", sites=SUMMARY.sites, resumed_from=first - 1)
    )


def play(tracker: Tracker, number: int) -> None:
    for phase in ("cohort", "train", "evaluate"):
        tracker(PhaseBegan(round=number, name=phase))
    done, metrics = ROUNDS[number - 1]
    tracker(RoundDone(record=done, metrics=metrics))


def end(tracker: Tracker) -> None:
    tracker(PhaseBegan(round=3, name="test"))
    tracker(Finished(summary=SUMMARY))


def console() -> tuple[ConsoleTracker, io.StringIO]:
    out = io.StringIO()
    return ConsoleTracker(Console(file=out, width=110)), out


def test_a_console_in_another_process_says_what_one_in_this_process_says(tmp_path: Path) -> None:
    direct, said = console()
    written = EventsTracker(tmp_path / "events.jsonl")
    for tracker in (direct, written):
        begin(tracker, 1)
        play(tracker, 1)
        begin(tracker, 2)  # the ServerApp was killed and started again
        play(tracker, 2)
        play(tracker, 3)
        end(tracker)
    assert "away" in said.getvalue() and "set aside" in said.getvalue()

    content, draw = (tmp_path / "events.jsonl").read_bytes(), random.Random(3)
    for size in (len(content), 1000, 7):  # a reader that comes while it is written, at any byte
        growing = tmp_path / f"growing-{size}.jsonl"
        replayed, heard = console()
        reader = EventsReader(growing)
        assert reader.read() == []
        while (at := growing.stat().st_size if growing.exists() else 0) < len(content):
            with growing.open("ab") as stream:
                stream.write(content[at : at + draw.randint(1, 2 * size)])
            reader = EventsReader(growing, reader.offset)  # the reader may be started again, too
            for event in reader.read():
                replayed(event)
        assert heard.getvalue() == said.getvalue()
        assert replayed.summary == SUMMARY


def test_half_a_line_that_a_kill_left_is_passed_over_and_nothing_after_it_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    begin(EventsTracker(path), 1)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in (1, len(lines[-1]) // 2, len(lines[-1]) - 1):  # of the last line, its end among them
        path.write_bytes(b"".join(lines[:-1]) + lines[-1][:cut])
        reader = EventsReader(path)
        assert [event.event for event in reader.read()] == ["phase", "refused"]
        end(EventsTracker(path))
        kept = [] if cut < len(lines[-1]) - 1 else ["start"]  # only its line feed was missing
        assert [event.event for event in reader.read()] == [*kept, "phase", "finish"]


def test_lines_of_another_version_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"version":2,"event":"phase","round":1,"name":"train"}\n{"version":1,"event":"new"}\n')
    EventsTracker(path)(PhaseBegan(round=1, name="train"))
    assert [event.event for event in EventsReader(path).read()] == ["phase"]


def test_follow_waits_for_more(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events = follow(path, poll_seconds=0)
    assert next(events) is None
    EventsTracker(path)(JOIN)
    assert (event := next(events)) is not None and event.event == "phase"
    assert next(events) is None


def test_warnings_reach_trackers_and_a_follower_says_them_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[Event] = []
    logger = logging.getLogger("quorate.server.exchange.join")
    with telling_warnings(tmp_path, [heard.append]):
        logger.info("not this")
        logger.warning("the rows of %s are not those of the rounds before", "north")
    logger.warning("nor this")
    (event,) = EventsReader(tmp_path / "events.jsonl").read()
    assert isinstance(event, LogMessage) and heard == [event]
    caplog.clear()
    follower = Follower(Console(file=io.StringIO()))
    follower(event)
    assert caplog.messages == ["the rows of north are not those of the rounds before"]
    follower.tracker(event)  # in the run's own process it was said when it was logged
    assert len(caplog.messages) == 1


def test_a_tracker_that_fails_is_named_stops_nobody_and_its_failure_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[Event] = []

    def broken(event: Event) -> None:
        raise ValueError("broken")

    trackers = [broken, heard.append]
    with telling_warnings(tmp_path, trackers):
        tell(trackers, JOIN)
    failure, join = heard
    assert isinstance(failure, LogMessage) and failure.level == logging.ERROR and join == JOIN
    assert "broken failed in phase (ValueError" in failure.text
    assert len(caplog.messages) == 2, "that it failed to take its own failure is not told again"


def test_a_tracker_that_interrupts_ends_the_run() -> None:
    def stop(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tell([stop], JOIN)


def test_lines_of_the_release_before_are_read_and_written_as_they_were(tmp_path: Path) -> None:
    before = EVENTS.read_text().splitlines()
    read = EventsReader(EVENTS).read()
    assert [event.event for event in read] == [json.loads(line)["event"] for line in before]
    assert {event.event for event in read} == {kind.model_fields["event"].default for kind in KINDS}
    written = EventsTracker(tmp_path / "events.jsonl")
    for event in read:
        written(event)
    now = (tmp_path / "events.jsonl").read_text().splitlines()
    for old, new in zip(before, now, strict=True):
        assert contains(json.loads(new), json.loads(old))


def contains(new: Any, old: Any) -> bool:
    """Whether all that was written before is there still; fields may have been added."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() <= new.keys() and all(contains(new[key], old[key]) for key in old)
    return bool(new == old)


def test_the_file_is_the_owners_alone_and_a_bad_place_is_said(tmp_path: Path) -> None:
    EventsTracker(tmp_path / "events.jsonl")(JOIN)
    assert (tmp_path / "events.jsonl").stat().st_mode & 0o077 == 0
    missing = tmp_path / "missing" / "events.jsonl"
    with refuses(OutputError, "not-written") as caught:
        EventsTracker(missing)(JOIN)
    assert str(missing) in str(caught.value)
