"""The runs of a federation at the coordinator: their folders, and how each stands."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from quorate.server.federation.folder import FederationFolder
from quorate.server.rounds.checkpoint import list_checkpoints
from quorate.server.rounds.run import RUN_FILE
from quorate.server.tracking.events import EVENTS_FILE
from quorate.server.tracking.run_status import STATUS_FILE, RunFile, RunStatus, State
from quorate.shared.config.load import load_run
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ConfigError
from quorate.shared.process.files import held, writing

CONTROL_FILE, CONTROL_LOCK = "control.json", "control.lock"
RunState = State | Literal["waiting", "lost"]
"""As in status.json; `waiting` for a ServerApp to begin, `lost` where it died and the run was not submitted
again."""


class Submission(RunFile):
    """`control.json`: what the command that submits a run keeps of it."""

    name_of_file = CONTROL_FILE
    damaged = "not as `quorate run` writes it; delete it."
    started: datetime
    """When the run was first submitted (UTC)."""
    output_dir: str
    """Where its results go at the end; absolute."""
    flower_runs: tuple[int, ...] = ()
    """Flower's id of every submission, in order."""


@dataclass(frozen=True)
class RunFolder:
    """One run at the coordinator.

    Args:
        path: its folder, named by the run id.
    """

    path: Path

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def config(self) -> RunConfig:
        """The run's configuration. Raises: ConfigError."""
        return load_run(self.path / RUN_FILE)

    @property
    def rounds_done(self) -> int:
        """The last finished round; 0 before the first."""
        return max(list_checkpoints(self.path), default=0)

    @property
    def started(self) -> datetime:
        """When it was first submitted (UTC)."""
        submission = Submission.read(self.path)
        return submission.started if submission else datetime.fromtimestamp(self.path.stat().st_mtime, UTC)

    @property
    def flower_run(self) -> int | None:
        """Flower's id of the newest submission."""
        submission = Submission.read(self.path)
        return submission.flower_runs[-1] if submission and submission.flower_runs else None

    @property
    def occupied(self) -> bool:
        """Whether a ServerApp is at work in the folder: it holds a lock that is gone with it."""
        is_held = held(self.path)
        if is_held is not None:
            return is_held
        # A file system without locks: only status.json says how the run stands.
        status = RunStatus.read(self.path)
        return status is not None and status.state == "running"

    @contextmanager
    def follow(self) -> Iterator[None]:
        """Be seen to follow the run; several commands may. The lock is gone with the process.

        Raises: OutputError: the folder cannot be written.
        """
        with writing(self.path):
            descriptor = os.open(self.path / CONTROL_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with suppress(OSError):  # a file system without locks: `followed` does not know then
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            yield
        finally:
            with suppress(OSError):  # not by closing alone: a process that was forked may have it open too
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    @property
    def followed(self) -> bool | None:
        """Whether a command follows the run and would submit it again; None where locks do not tell."""
        try:
            descriptor = os.open(self.path / CONTROL_LOCK, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return None
        finally:
            os.close(descriptor)
        return False

    @property
    def heard(self) -> datetime | None:
        """When the ServerApp last wrote a word (UTC); None before its first."""
        files = [self.path / name for name in (STATUS_FILE, EVENTS_FILE)]
        found = [path.stat().st_mtime for path in files if path.is_file()]
        return datetime.fromtimestamp(max(found), UTC) if found else None

    @property
    def state(self) -> RunState:
        occupied, status = self.occupied, RunStatus.read(self.path)
        newest = self.flower_run
        if status is None or (newest is not None and status.flower_run_id != newest and not occupied):
            return "waiting"
        return "lost" if status.state == "running" and not occupied else status.state


def list_runs(folder: FederationFolder) -> list[RunFolder]:
    """Return a federation's runs, the newest first."""
    found = [RunFolder(path.parent) for path in folder.runs.glob(f"*/{RUN_FILE}")]
    return sorted(found, key=lambda run: run.started, reverse=True)


def find_run_folder(folder: FederationFolder, run_id: str) -> RunFolder:
    """Return the run with this id, or the only one whose id begins so.

    Raises: ConfigError: there is none, or there are several.
    """
    runs = list_runs(folder)
    found = [run for run in runs if run.run_id.startswith(run_id)] if run_id else []
    if len(found) == 1:
        return found[0]
    known = ", ".join(run.run_id for run in (found or runs)[:5]) or "none"
    problem = f"{len(found)} runs begin with {run_id!r}" if found else f"there is no run {run_id!r}"
    message = f"{problem} in federation {folder.config.name} ({known}); `quorate runs list` shows them."
    raise ConfigError(message, kind="no-such-run")
