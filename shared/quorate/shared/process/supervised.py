"""A supervisor seen from another process: started in the background, looked at, stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from quorate.shared.config.config_model import ConfigModel
from quorate.shared.errors import OutputError, QuorateError
from quorate.shared.process.files import holder

STATUS_FILE, LOCK_FILE = "status.json", "supervisor.lock"
OWN_LOG = "QUORATE_SUPERVISOR_LOG"
"""Environment variable of a supervisor in the background: where what it says itself goes."""
_POLL_SECONDS = 0.2


class ProgramState(ConfigModel):
    """A program as people are told of it."""

    pid: int | None
    """Process id; None between its death and its restart."""
    restarts: int
    since: datetime
    """When it started, or died."""
    problem: str | None
    """What is wrong with it, found by asking it; None: it works."""


class ProgramStatus(ConfigModel):
    """A program as its supervisor sees it."""

    pid: int | None
    """Process id; None between death and restart."""
    since: float
    """When it started, or died [Unix time]."""
    restarts: int
    last_exit: int | None = None
    """How it ended last: exit code, or minus the signal."""
    problem: str | None = None
    """Why it could not be started the last time; None while it runs."""

    @property
    def stopped(self) -> str | None:
        """Why there is no process of it; None where there is one."""
        if self.pid is not None:
            return None
        return f"cannot be started ({self.problem})" if self.problem else "does not run"

    def judged(self, problem: str | None) -> ProgramState:
        """Return it with what is wrong with it; None: nothing is."""
        since = datetime.fromtimestamp(self.since, UTC)
        return ProgramState(pid=self.pid, restarts=self.restarts, since=since, problem=problem)


class Status(ConfigModel):
    """What `status.json` holds."""

    pid: int
    """The supervisor's process id."""
    programs: dict[str, ProgramStatus]


def start_detached(
    command: Sequence[str], state_dir: Path, output: Path, ready: Callable[[], bool], timeout: float
) -> subprocess.Popen[bytes]:
    """Start a supervisor in the background and wait until what it runs is ready.

    Args:
        command: runs `Supervisor.run` in its foreground.
        state_dir: its folder.
        output: its log.
        ready: asked again and again.
        timeout: longest wait [s].
    Returns: the process, which goes on when this one ends.
    Raises: OutputError: one is running already. QuorateError: it ended, or nothing was ready in time; what
        was started is stopped again.
    """
    refuse_second(state_dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab") as file:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, OWN_LOG: str(output)},
            start_new_session=True,
        )
    deadline = time.monotonic() + timeout
    try:
        while not ready():
            if process.poll() is not None:
                refuse_second(state_dir)  # another one began at the same time, and has the lock
                message = f"it ended at once ({process.returncode}); {output} says why."
                raise QuorateError(message, kind="ended-at-once")
            if time.monotonic() > deadline:
                message = f"it was not ready after {timeout:.0f} s; {output} and the logs say why."
                raise QuorateError(message, kind="not-ready-in-time")
            time.sleep(_POLL_SECONDS)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    return process


def stop(state_dir: Path, timeout: float = 60.0) -> bool:
    """Stop the supervisor of a folder and all it runs; returns whether there was one.

    Raises: QuorateError: it is still there after `timeout` seconds.
    """
    status = read_status(state_dir)
    if status is None:
        return False
    os.kill(status.pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout
    while holder(state_dir / LOCK_FILE) is not None:
        if time.monotonic() > deadline:
            raise QuorateError(f"process {status.pid} did not stop within {timeout:.0f} s.")
        time.sleep(_POLL_SECONDS)
    return True


def refuse_second(state_dir: Path, what: str | None = None, remedy: str = "stop it first") -> None:
    """Raise OutputError where a supervisor has this folder, saying which process that is.

    Args:
        state_dir: its folder.
        what: whose it is; the folder when left out.
        remedy: what to do about it.
    """
    pid = holder(state_dir / LOCK_FILE)
    if pid is not None:
        process = f" (process {pid})" if pid else ""
        message = f"{what or f'{state_dir}:'} is running already{process}; {remedy}."
        raise OutputError(message, kind="running-already")


def read_status(state_dir: Path) -> Status | None:
    """Return what a running supervisor wrote last; None when none is running, whatever the file says.

    One that has the lock and has not written yet, or is about to leave, has no programs.
    """
    pid = holder(state_dir / LOCK_FILE)
    if pid is None:
        return None
    try:
        status = Status.model_validate_json((state_dir / STATUS_FILE).read_bytes())
        # An earlier one that was killed has left its file; and 0 is one of a release that signed no locks.
        return status if pid in (0, status.pid) else Status(pid=pid, programs={})
    except FileNotFoundError:
        return Status(pid=pid, programs={}) if pid else None
    except ValidationError as error:
        message = f"{state_dir / STATUS_FILE}: damaged; stop the supervisor and start again."
        raise OutputError(message) from error
