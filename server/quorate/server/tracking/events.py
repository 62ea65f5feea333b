"""Progress of a run as a file: one JSON line per event.

The ServerApp writes it, whoever watches follows it from another process. The writer may be killed at any byte
and start again: a new `start` event follows then, and half a line that a kill left is passed over.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SerializeAsAny, TypeAdapter, ValidationError

from quorate.server.tracking.records import Exclusion, Record, RoundMetrics, RoundRecord, Summary
from quorate.server.tracking.trackers import Tracker
from quorate.shared.config.run_config import RunConfig
from quorate.shared.process.files import open_to_append, writing
from quorate.shared.protocol.messages import SiteDescription

log = logging.getLogger(__name__)

EVENTS_FILE = "events.jsonl"
VERSION: Literal[1] = 1
POLL_SECONDS = 0.5


class _Event(Record):
    """What all events have. Fields are only ever added; another meaning gets another version."""

    version: Literal[1] = VERSION
    """Version of this format."""
    at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    """When it was written (UTC)."""


class Started(_Event):
    """Tracker.start: rounds begin, or go on in a new process."""

    event: Literal["start"] = "start"
    """Kind of event."""
    run: SerializeAsAny[RunConfig]
    """The run's configuration."""
    run_id: str
    """Identity of the run."""
    output_dir: str
    """The run's folder at the coordinator."""
    sites: dict[str, SiteDescription]
    """The sites that joined, and what they said of themselves."""
    resumed_from: int
    """The last finished round; 0 for a new run."""


class Refused(_Event):
    """Tracker.refused: sites that answered, or should have, and cannot take part."""

    event: Literal["refused"] = "refused"
    """Kind of event."""
    sites: dict[str, Exclusion]
    """Site -> why."""


class PhaseBegan(_Event):
    """Tracker.phase."""

    event: Literal["phase"] = "phase"
    """Kind of event."""
    round: int
    """Round, from 1; 0 while sites join."""
    name: str
    """The step that begins."""


class Waiting(_Event):
    """Tracker.waiting."""

    event: Literal["waiting"] = "waiting"
    """Kind of event."""
    sites: dict[str, float]
    """Site -> seconds since it was asked, without an answer."""


class RoundDone(_Event):
    """Tracker.round: the round is on disk."""

    event: Literal["round"] = "round"
    """Kind of event."""
    record: RoundRecord
    """What it did."""
    metrics: RoundMetrics
    """What was measured."""


class Finished(_Event):
    """Tracker.finish."""

    event: Literal["finish"] = "finish"
    """Kind of event."""
    summary: Summary
    """The whole run."""


class Said(_Event):
    """A log message of the coordinator, for the person who watches."""

    event: Literal["log"] = "log"
    """Kind of event."""
    level: int
    """As in `logging`."""
    logger: str
    """Who said it."""
    text: str
    """What was said."""


Event = Started | Refused | PhaseBegan | Waiting | RoundDone | Finished | Said
_PARSER: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="event")])


class EventsTracker:
    """A tracker that appends every event to a file, a line in one write each.

    Args:
        path: the file; made with its first line. What another process wrote before stays.
    Raises: OutputError: a line cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(
        self,
        run: RunConfig,
        run_id: str,
        output_dir: Path,
        sites: Mapping[str, SiteDescription],
        resumed_from: int,
    ) -> None:
        """Append that rounds begin."""
        self.append(
            Started(
                run=run,
                run_id=run_id,
                output_dir=str(output_dir),
                sites=dict(sites),
                resumed_from=resumed_from,
            )
        )

    def refused(self, sites: Mapping[str, Exclusion]) -> None:
        """Append which sites cannot take part."""
        self.append(Refused(sites=dict(sites)))

    def phase(self, round: int, name: str) -> None:
        """Append that a step begins."""
        self.append(PhaseBegan(round=round, name=name))

    def waiting(self, sites: Mapping[str, float]) -> None:
        """Append who is being waited for."""
        self.append(Waiting(sites=dict(sites)))

    def round(self, record: RoundRecord, metrics: RoundMetrics) -> None:
        """Append a finished round."""
        self.append(RoundDone(record=record, metrics=metrics))

    def finish(self, summary: Summary) -> None:
        """Append the end."""
        self.append(Finished(summary=summary))

    def append(self, event: Event) -> None:
        """Append one event. A single unbuffered write: a kill of this process leaves the line or nothing."""
        line = event.model_dump_json().encode() + b"\n"
        with writing(self._path):
            descriptor = open_to_append(self._path, private=True)
            try:
                size = os.fstat(descriptor).st_size
                if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a full disk, or the power went
                    line = b"\n" + line
                while line:
                    line = line[os.write(descriptor, line) :]
            finally:
                os.close(descriptor)


class EventsHandler(logging.Handler):
    """Passes log messages on to a tracker's file, so that they reach the person who started the run.

    Args:
        tracker: where they go.
        level: from which on.
    """

    def __init__(self, tracker: EventsTracker, level: int = logging.WARNING) -> None:
        super().__init__(level)
        self._tracker = tracker

    def emit(self, record: logging.LogRecord) -> None:
        """Append one message, without a traceback: that is in the process's own log."""
        try:
            self._tracker.append(Said(level=record.levelno, logger=record.name, text=record.getMessage()))
        except Exception:
            self.handleError(record)


class EventsReader:
    """Reads whole lines as they come; keeps its place in bytes.

    Args:
        path: the file, which need not be there yet.
        offset: where to begin; the place at which another reader stopped.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._path = path
        self.offset = offset

    def read(self) -> list[Event]:
        """Return what was appended since the last call. Half a line waits for its other half.

        A whole line that is no event (half a line of a process that was killed, or written by another
        version) is passed over. Raises: OSError.
        """
        try:
            with self._path.open("rb") as stream:
                stream.seek(self.offset)
                content = stream.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self.offset += len(whole)
        return [event for line in whole.split(b"\n") if (event := _parse(line)) is not None]


def _parse(line: bytes) -> Event | None:
    if not line.strip():
        return None
    try:
        return _PARSER.validate_json(line)
    except ValidationError:
        log.debug("passing over a line that is no event (%d bytes)", len(line))
        return None


def follow(path: Path, from_offset: int = 0, poll_seconds: float = POLL_SECONDS) -> Iterator[Event | None]:
    """Yield events as they are appended, and None each time there is nothing new, for ever.

    The caller ends it; it looks at the run's state at each None.
    """
    reader = EventsReader(path, from_offset)
    while True:
        events = reader.read()
        yield from events
        if not events:
            yield None
            time.sleep(poll_seconds)


def replay(event: Event, tracker: Tracker, output_dir: Path | None = None) -> None:
    """Tell a tracker of this process what the event says.

    Args:
        output_dir: named in `start` instead of the writer's own, where the results will lie elsewhere.
    """
    match event:
        case Started():
            folder = output_dir or Path(event.output_dir)
            tracker.start(event.run, event.run_id, folder, event.sites, event.resumed_from)
        case Refused():
            tracker.refused(event.sites)
        case PhaseBegan():
            tracker.phase(event.round, event.name)
        case Waiting():
            tracker.waiting(event.sites)
        case RoundDone():
            tracker.round(event.record, event.metrics)
        case Finished():
            tracker.finish(event.summary)
        case Said():
            logging.getLogger(event.logger).log(event.level, "%s", event.text)
