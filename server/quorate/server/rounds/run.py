"""A run at the coordinator: configuration, output folder, identity, and where it resumes."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from quorate.server.rounds.checkpoint import Progress, list_checkpoints, load_checkpoint
from quorate.server.tracking.events import EVENTS_FILE, Event, EventsTracker, Tracker, tell
from quorate.server.tracking.records import RoundMetrics, RoundRecord
from quorate.shared.aggregation import GlobalState
from quorate.shared.config.load import load_run
from quorate.shared.config.read import dump_yaml
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import CheckpointError, OutputError
from quorate.shared.process.files import BY_UMASK, PRIVATE, locked, opened, write_atomically, writing

log = logging.getLogger(__name__)

RUN_FILE, RECORD_FILE, METRICS_FILE = "run.yaml", "record.jsonl", "metrics.jsonl"
ADAPTER_DIR, SUMMARY_FILE = "adapter", "summary.json"


@dataclass
class Run:
    """One job.

    Args:
        config: resolved configuration (with the model's hash).
        output_dir: everything the run writes.
        run_id: outlives restarts.
        resumed: state and progress of the checkpoint to go on from, if any.
        trackers: told what happens, once it is in the run's own file of events.
    """

    config: RunConfig
    output_dir: Path
    run_id: str
    resumed: tuple[GlobalState, Progress] | None = None
    trackers: Sequence[Tracker] = field(default_factory=tuple)

    @property
    def metric(self) -> str:
        return self.config.metric

    @classmethod
    def open(
        cls,
        config: RunConfig,
        output_dir: Path,
        *,
        resume: bool = False,
        trackers: Sequence[Tracker] = (),
        run_id: str | None = None,
    ) -> Run:
        """Make or reopen the output folder.

        Args:
            resume: go on with what is there.
            run_id: identity of a run that has no checkpoint yet; a new one when left out.

        Raises:
            OutputError: the folder holds a run already and `resume` is off, or cannot be written.
            CheckpointError: the checkpoint is damaged or of another run.
        """
        checkpoints = list_checkpoints(output_dir)
        used = checkpoints or (output_dir / RUN_FILE).exists()
        if used and not resume:
            raise run_in_folder(output_dir)
        if not used:
            check_free(output_dir, (ADAPTER_DIR, RECORD_FILE, METRICS_FILE, EVENTS_FILE, SUMMARY_FILE))
        _make_folder(output_dir)
        if (output_dir / RUN_FILE).exists():
            _check_same(load_run(output_dir / RUN_FILE), config, output_dir)
        resumed = load_checkpoint(output_dir, checkpoints[-1]) if checkpoints else None
        if resumed and resumed[1].config_hash != config.content_hash:
            message = f"{output_dir}/checkpoint-{checkpoints[-1]} is of another run than run.yaml."
            raise CheckpointError(message, kind="other-run")
        write_atomically(output_dir / RUN_FILE, dump_yaml(config), BY_UMASK)
        if resumed and config.privacy is not None:
            log.warning(
                "differential privacy: the rounds to come draw new noise, so the run does not end bit for "
                "bit where it would have ended"
            )
        run_id = resumed[1].run_id if resumed else run_id or uuid.uuid4().hex[:16]
        run = cls(config, output_dir, run_id, resumed, trackers)
        run._align_logs()
        return run

    def reload(self) -> tuple[GlobalState, Progress] | None:
        """Return the newest checkpoint, with the JSONL files brought to it; None before the first.

        For the end of a run that was interrupted: a round counts once its checkpoint is on disk, even if the
        interrupt came before anybody was told.
        """
        rounds = list_checkpoints(self.output_dir)
        self.resumed = load_checkpoint(self.output_dir, rounds[-1]) if rounds else None
        self._align_logs()
        return self.resumed

    def append(self, record: RoundRecord, metrics: RoundMetrics) -> None:
        """Add a round's lines to record.jsonl and metrics.jsonl.

        Raises: OutputError: they cannot be written; the next resume mends half a line.
        """
        for name, line in ((RECORD_FILE, record), (METRICS_FILE, metrics)):
            path = self.output_dir / name
            with writing(path), opened(path, "ab", private=self.config.hides_participation) as stream:
                stream.write(line.model_dump_json().encode() + b"\n")

    def tell(self, event: Event) -> None:
        """Write an event to the run's file and pass it to every tracker; one that fails is logged.

        Raises: OutputError: the file cannot be written.
        """
        EventsTracker(self.output_dir / EVENTS_FILE)(event)
        tell(self.trackers, event)

    def _align_logs(self) -> None:
        """Bring the JSONL files to the checkpoint: a kill may have come before or in the middle of a line."""
        progress = self.resumed[1] if self.resumed else None
        last = progress.round if progress else 0
        for name, line in (
            (RECORD_FILE, progress and progress.record),
            (METRICS_FILE, progress and progress.metrics),
        ):
            path = self.output_dir / name
            kind = RoundRecord if name == RECORD_FILE else RoundMetrics
            kept = [each for each in read_jsonl(path, kind) if each.round < last]
            kept += [line] if line else []
            lines = "".join(each.model_dump_json() + "\n" for each in kept)
            write_atomically(path, lines, PRIVATE if self.config.hides_participation else BY_UMASK)


def read_jsonl(path: Path, kind: type[RoundRecord] | type[RoundMetrics]) -> list[RoundRecord | RoundMetrics]:
    """Read whole lines of a JSONL file; a last line without its end, cut off by a crash, is left out.

    Raises: OutputError: naming a line that was not written by a run.
    """
    if not path.exists():
        return []
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror}; mend that, then try again.") from error
    # Bytes: a crash may cut a character in two, and text has more line ends than this one.
    *lines, _cut_off = content.split(b"\n")
    read: list[RoundRecord | RoundMetrics] = []
    for number, line in enumerate(lines, start=1):
        try:
            read.append(kind.model_validate_json(line))
        except ValidationError as error:
            raise OutputError(
                f"{path}, line {number}: not a {kind.__name__} as a run writes it (edited or damaged); "
                "take the line out, then try again.",
                kind="bad-line",
            ) from error
    return read


@contextmanager
def locked_output(output_dir: Path) -> Iterator[None]:
    """Make the output folder and keep other processes from running into it at the same time.

    The lock is the system's and leaves no file: it is gone with the process, however that ends.

    Raises: OutputError: another process has it, or it cannot be made.
    """
    _make_folder(output_dir)
    busy = f"another process is running into {output_dir}; wait for its end, or choose another folder (-o)."
    with locked(output_dir, busy):
        yield


def _make_folder(output_dir: Path) -> None:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"cannot write to {output_dir}: {error.strerror}; choose another folder with -o."
        raise OutputError(message, kind="folder-not-made") from error


def run_in_folder(output_dir: Path) -> OutputError:
    """Return what to say where a new run is to go where one is already."""
    return OutputError(
        f"{output_dir} already holds a run; continue it with --resume, or choose another folder (-o).",
        kind="run-in-folder",
    )


def check_free(output_dir: Path, names: Iterable[str]) -> None:
    """Raise OutputError for one of `names`, which a run would write over and no run of ours left."""
    for name in names:
        if (output_dir / name).exists():
            raise OutputError(
                f"{output_dir} holds {name} but no run ({RUN_FILE}), and a new one would write over it; "
                "choose another folder (-o).",
                kind="would-overwrite",
            )


def _check_same(before: RunConfig, now: RunConfig, output_dir: Path) -> None:
    if before == now:
        return
    old, new = before.model_dump(), now.model_dump()
    changed = ", ".join(key for key in new if new[key] != old.get(key))
    raise CheckpointError(
        f"{output_dir} holds a run with other settings ({changed}); resume it with the same run file, "
        "or start the new one in another folder with -o.",
        kind="other-settings",
    )
