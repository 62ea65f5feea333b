"""What a run tells while it runs: one family of events, to callables and to `events.jsonl` in its folder.

Every run writes the file, a line for each event, and whoever watches follows it from another process. The
writer may be killed at any byte and start again: a new `start` follows then, and half a line that a kill left
is passed over. A tracker is any callable that takes an event; docs/events.md shows one.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SerializeAsAny, TypeAdapter, ValidationError

from quorate.server.tracking.records import Exclusion, Record, RoundMetrics, RoundRecord, SolvedHead, Summary
from quorate.shared.config.run_config import RunConfig
from quorate.shared.process.files import opened, writing
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
    """When it was told (UTC)."""


class Started(_Event):
    """The sites have joined, and rounds begin, or go on in a new process."""

    event: Literal["start"] = "start"
    """Kind of event."""
    run: SerializeAsAny[RunConfig]
    """The run's configuration."""
    run_id: str
    """Identity of the run; outlives restarts."""
    output_dir: str
    """The run's folder, in a federation that at the coordinator."""
    sites: dict[str, SiteDescription]
    """The sites that joined, and what they said of themselves."""
    resumed_from: int
    """The last finished round; 0 for a new run."""


class Refused(_Event):
    """Sites that answered, or should have, and cannot take part; before `start`, where there are any."""

    event: Literal["refused"] = "refused"
    """Kind of event."""
    sites: dict[str, Exclusion]
    """Site -> why."""


class PhaseBegan(_Event):
    """A step begins: before `start` (sites join), in a round, or after the last one (test, outputs)."""

    event: Literal["phase"] = "phase"
    """Kind of event."""
    round: int
    """Round, from 1; 0 while sites join."""
    name: str
    """The step that begins."""


class Waiting(_Event):
    """Somebody is being waited for; told now and then, in any phase."""

    event: Literal["waiting"] = "waiting"
    """Kind of event."""
    sites: dict[str, float]
    """Site -> time since it was asked, without an answer [s]."""


class HeadSolved(_Event):
    """The head that round 1 begins from was solved; again where a run is killed before round 1 ends."""

    event: Literal["head"] = "head"
    """Kind of event."""
    head: SolvedHead
    """From whose rows, and what it took."""


class RoundDone(_Event):
    """A round is finished, and on disk already."""

    event: Literal["round"] = "round"
    """Kind of event."""
    record: RoundRecord
    """What it did."""
    metrics: RoundMetrics
    """What was measured."""


class Finished(_Event):
    """The end, also of a run that was interrupted; its results are on disk."""

    event: Literal["finish"] = "finish"
    """Kind of event."""
    summary: Summary
    """The whole run."""


class LogMessage(_Event):
    """A warning or an error of the process that carries the run out, for the person who watches."""

    event: Literal["log"] = "log"
    """Kind of event."""
    level: int
    """As in `logging`; 30 is a warning, 40 an error."""
    logger: str
    """Name of the logger."""
    text: str
    """The message, without a traceback: that is in the process's own log."""


Event = Annotated[
    Started | Refused | PhaseBegan | Waiting | HeadSolved | RoundDone | Finished | LogMessage,
    Field(discriminator="event"),
]
Tracker = Callable[[Event], None]
"""Whoever wants to follow a run. It is called in the run's process, which waits for it; one that raises is
logged, and the run goes on. KeyboardInterrupt stops the run after what it is at, as Ctrl-C does."""
_PARSER: TypeAdapter[Event] = TypeAdapter(Event)


def tell(trackers: Iterable[Tracker], event: Event) -> None:
    """Call every tracker with the event; one that fails is logged and stops nobody."""
    for tracker in trackers:
        try:
            tracker(event)
        except Exception as error:
            log.error(
                "tracker %s failed in %s (%s: %s); the run goes on without it.",
                getattr(tracker, "__name__", type(tracker).__name__),
                event.event,
                type(error).__name__,
                error,
                exc_info=log.isEnabledFor(logging.DEBUG),
            )


class EventsTracker:
    """A tracker that appends every event to a file, a line in one write each.

    Args:
        path: the file; made with its first line, for its owner alone, as it names sites that were asked. What
            another process wrote before stays.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, event: Event) -> None:
        """Append one event. Raises: OutputError: it cannot be written."""
        line = event.model_dump_json().encode() + b"\n"
        with writing(self._path), opened(self._path, "ab", private=True) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size and os.pread(stream.fileno(), 1, size - 1) != b"\n":  # a full disk, or the power went
                line = b"\n" + line
            stream.write(line)


class _LogHandler(logging.Handler):
    """Tells log messages to trackers."""

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        super().__init__(logging.WARNING)
        self._trackers, self._telling = tuple(trackers), False

    def emit(self, record: logging.LogRecord) -> None:
        """Tell one message, but not that a tracker failed to take one: that would never end."""
        if self._telling:
            return
        self._telling = True  # logging lets one thread at a time in here
        try:
            text = record.getMessage()
            tell(self._trackers, LogMessage(level=record.levelno, logger=record.name, text=text))
        except Exception:
            self.handleError(record)
        finally:
            self._telling = False


@contextmanager
def telling_warnings(output_dir: Path, trackers: Iterable[Tracker] = ()) -> Iterator[None]:
    """Write our own warnings and errors to a run's events too, and tell them to its trackers."""
    trackers = (EventsTracker(output_dir / EVENTS_FILE), *trackers)
    handler, ours = _LogHandler(trackers), logging.getLogger("quorate")
    ours.addHandler(handler)
    try:
        yield
    finally:
        ours.removeHandler(handler)


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
