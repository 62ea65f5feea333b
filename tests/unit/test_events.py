"""events.jsonl: what one process tells a tracker, a tracker of another one hears."""

from __future__ import annotations

import io
import logging
import random
from pathlib import Path

import pytest
from report_data import TIMEOUT, Shape, config, make_summary, record, round_metrics
from rich.console import Console

from quorate.deploy.console import ConsoleTracker
from quorate.server.tracking.events import EventsHandler, EventsReader, EventsTracker, Said, follow, replay
from quorate.server.tracking.trackers import Tracker
from quorate.shared.errors import OutputError

SHAPE = Shape(rounds=3, planned=3)
RUN = config(SHAPE)
ROUNDS = [(record(SHAPE, r), round_metrics(RUN, SHAPE, r)) for r in range(1, 4)]
ROUNDS[1] = (ROUNDS[1][0].model_copy(update={"excluded": {"kidney": TIMEOUT}}), ROUNDS[1][1])
SUMMARY = make_summary(RUN, SHAPE, *map(list, zip(*ROUNDS, strict=True)))


def begin(tracker: Tracker, first: int) -> None:
    tracker.phase(0, "join")
    tracker.refused({"away": TIMEOUT})
    tracker.start(RUN, SUMMARY.run_id, Path("out"), SUMMARY.sites, first - 1)


def play(tracker: Tracker, number: int) -> None:
    for phase in ("cohort", "train", "evaluate"):
        tracker.phase(number, phase)
    tracker.round(*ROUNDS[number - 1])


def end(tracker: Tracker) -> None:
    tracker.phase(3, "test")
    tracker.finish(SUMMARY)


def console() -> tuple[ConsoleTracker, io.StringIO]:
    out = io.StringIO()
    return ConsoleTracker(Console(file=out, width=110)), out


def test_a_console_in_another_process_says_what_one_in_this_process_says(tmp_path: Path) -> None:
    direct, said = console()
    written = EventsTracker(tmp_path / "events.jsonl")
    for tracker in (direct, written):
        assert isinstance(tracker, Tracker)
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
                replay(event, replayed)
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
    EventsTracker(path).phase(1, "train")
    assert [event.event for event in EventsReader(path).read()] == ["phase"]


def test_follow_waits_for_more(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events = follow(path, poll_seconds=0)
    assert next(events) is None
    EventsTracker(path).phase(0, "join")
    assert (event := next(events)) is not None and event.event == "phase"
    assert next(events) is None


def test_warnings_of_the_coordinator_come_along(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = EventsTracker(tmp_path / "events.jsonl")
    logger = logging.getLogger("quorate.server.exchange.join")
    handler = EventsHandler(tracker)
    logger.addHandler(handler)
    try:
        logger.info("not this")
        logger.warning("the rows of %s are not those of the rounds before", "north")
    finally:
        logger.removeHandler(handler)
    (event,) = EventsReader(tmp_path / "events.jsonl").read()
    assert isinstance(event, Said)
    caplog.clear()
    replay(event, console()[0])
    assert caplog.messages == ["the rows of north are not those of the rounds before"]


def test_the_file_is_the_owners_alone_and_a_bad_place_is_said(tmp_path: Path) -> None:
    EventsTracker(tmp_path / "events.jsonl").phase(0, "join")
    assert (tmp_path / "events.jsonl").stat().st_mode & 0o077 == 0
    with pytest.raises(OutputError, match="cannot write"):
        EventsTracker(tmp_path / "missing" / "events.jsonl").phase(0, "join")
