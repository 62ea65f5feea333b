"""Keeps a few programs running: restarts what dies, with back-off, and stops all of them together.

systemd does this too where it is there; this works in a container, on loopback and in a test alike. Linux
only: the kernel ends the programs when their supervisor dies, so that none is left over after a kill -9.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from quorate.shared.errors import OutputError
from quorate.shared.process import end_with_parent
from quorate.shared.process.files import BY_UMASK, take_lock, write_atomically
from quorate.shared.process.logs import Logs
from quorate.shared.process.supervised import (
    LOCK_FILE,
    OWN_LOG,
    STATUS_FILE,
    ProgramStatus,
    Status,
    refuse_second,
)

log = logging.getLogger(__name__)

FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0
"""Seconds before a restart; doubled each time a program dies young."""
STEADY_SECONDS = 60.0
"""A program that ran so long starts with the first delay again."""
STOP_SECONDS = 20.0
"""What a program gets between SIGTERM and SIGKILL."""
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Program:
    """One program to keep running.

    Args:
        name: in status and messages.
        command: program and arguments.
        log: file that its output is appended to, each line with its time; it gives way to a new one in time.
        env: environment variables on top of the supervisor's.
        cwd: working directory.
        user: operating-system user to run as; needs root.
        group: primary group to run as, where it is not the user's own.
        kill_group: when it dies, its children die with it. Off where they are to outlive it until all stops.
    """

    name: str
    command: Sequence[str]
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    user: str | None = None
    group: str | None = None
    kill_group: bool = True


class Supervisor:
    """Runs programs until it is told to stop.

    Args:
        state_dir: holds the lock and status.json.
        programs: started in this order, stopped in the reverse one.
        beside: called in a thread of its own while they run; it ends with this process.
    """

    def __init__(
        self, state_dir: Path, programs: Sequence[Program], beside: Callable[[], None] | None = None
    ) -> None:
        self._state_dir = state_dir
        self._kept = [_Kept(program) for program in programs]
        self._beside = beside
        self._stopping = False
        self._unwritten = self._failing = False

    def run(self) -> None:
        """Start everything and stay until SIGTERM or SIGINT. To be called from the main thread.

        A program that cannot be started again is tried again, as one that dies at once: what keeps it from
        starting, such as a lack of memory or of disk, may pass, and the others go on meanwhile.

        Raises: OutputError: another supervisor has this folder. OSError: a program cannot even be
            started once.
        """
        # Before the lock, by which others know of this process: they may stop it as soon as they do.
        before = {each: signal.signal(each, self._stop) for each in (signal.SIGTERM, signal.SIGINT)}
        try:
            with _locked(self._state_dir), _logs([kept.program.log for kept in self._kept]) as logs:
                self._keep_running(logs)
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def _keep_running(self, logs: Logs) -> None:
        try:
            if self._beside is not None:  # not earlier: what it says goes to the log too
                threading.Thread(target=self._beside, daemon=True).start()
            while not self._stopping:
                logs.tend()
                if any([kept.tend(logs) for kept in self._kept]):  # each of them, not up to the first
                    self._unwritten = True
                if self._unwritten:
                    self._write()
                time.sleep(_POLL_SECONDS)
        finally:
            for kept in reversed(self._kept):
                kept.stop()
            (self._state_dir / STATUS_FILE).unlink(missing_ok=True)

    def _stop(self, number: int, _frame: object) -> None:
        log.info("%s: stopping", signal.Signals(number).name)
        self._stopping = True

    def _write(self) -> None:
        status = Status(pid=os.getpid(), programs={kept.program.name: kept.status for kept in self._kept})
        try:
            write_atomically(self._state_dir / STATUS_FILE, status.model_dump_json(indent=2), BY_UMASK)
        except OutputError as error:  # a full disk is no reason to stop what runs; written once there is room
            if not self._failing:
                log.error("%s", error)
            self._failing = True
        else:
            self._unwritten = self._failing = False


class _Kept:
    """A program and the process that it is at the moment."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._since = time.time()
        self._started = 0.0
        self._due = 0.0
        self._delay = FIRST_DELAY
        self._starts = 0
        self._last_exit: int | None = None
        self._problem: str | None = None
        self._leaders: list[int] = []

    @property
    def status(self) -> ProgramStatus:
        return ProgramStatus(
            pid=self._process.pid if self._process else None,
            since=self._since,
            restarts=max(self._starts - 1, 0),
            last_exit=self._last_exit,
            problem=self._problem,
        )

    def tend(self, logs: Logs) -> bool:
        """Start the program where it is due, notice its death; returns whether anything changed."""
        if self._process is None:
            if time.monotonic() < self._due:
                return False
            try:
                self._start(logs)
            except (OSError, subprocess.SubprocessError, KeyError) as error:  # the last: no such user
                if not self._starts:
                    raise
                self._problem = f"{type(error).__name__}: {error}"
                self._back_off(f"cannot be started ({self._problem})")
            return True
        code = self._process.poll()
        if code is None:
            return False
        if self.program.kill_group:
            _signal_group(self._process.pid, signal.SIGKILL)
            self._leaders.remove(self._process.pid)
        if time.monotonic() - self._started >= STEADY_SECONDS:
            self._delay = FIRST_DELAY
        self._back_off(f"ended ({code})")
        self._process, self._last_exit, self._since = None, code, time.time()
        return True

    def _back_off(self, why: str) -> None:
        """Let it rest for a while, longer each time."""
        log.warning("%s %s; starting it again in %.1f s", self.program.name, why, self._delay)
        self._due = time.monotonic() + self._delay
        self._delay = min(2 * self._delay, LONGEST_DELAY)

    def stop(self) -> None:
        """End the process, then what it started, also what earlier ones of it left."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                log.warning("%s did not stop within %.0f s; killing it", self.program.name, STOP_SECONDS)
                self._process.kill()
                self._process.wait()
        left = [leader for leader in self._leaders if _signal_group(leader, signal.SIGTERM)]
        deadline = time.monotonic() + STOP_SECONDS
        while any(_signal_group(leader, 0) for leader in left) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        for leader in left:
            _signal_group(leader, signal.SIGKILL)

    def _start(self, logs: Logs) -> None:
        program = self.program
        self._process = _started(program, logs.into(program.log))
        self._leaders.append(self._process.pid)
        self._starts += 1
        self._started, self._since, self._problem = time.monotonic(), time.time(), None
        log.info("%s started as process %d", program.name, self._process.pid)


@contextmanager
def _locked(state_dir: Path) -> Iterator[None]:
    state_dir.mkdir(parents=True, exist_ok=True)
    # Not inherited by the programs (O_CLOEXEC is Python's default), so the lock ends with this process.
    with (state_dir / LOCK_FILE).open("a") as file:
        try:
            take_lock(file.fileno())
        except BlockingIOError:
            refuse_second(state_dir)
            raise OutputError(f"{state_dir}: was running until now; give the command again.") from None
        yield


@contextmanager
def _logs(files: Sequence[Path]) -> Iterator[Logs]:
    """Keep the programs' logs, and this process's own where `start_detached` has given it a file."""
    named = os.environ.pop(OWN_LOG, None)
    own = Path(named) if named else None
    logs = Logs([*files, *filter(None, [own])])
    try:
        with logs.own(own):
            yield logs
    finally:
        logs.close()


def _started(program: Program, output: int) -> subprocess.Popen[bytes]:
    """Start a program that ends with this process; returns when it runs. Raises: OSError: it cannot."""
    helper = [sys.executable, "-I", "-S", end_with_parent.__file__]
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as failed:
        try:
            process = subprocess.Popen(
                [*helper, str(os.getpid()), str(writing), *program.command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **program.env},
                cwd=program.cwd,
                user=program.user,
                group=program.group or (_group_of(program.user) if program.user else None),
                extra_groups=[] if program.user else None,
                start_new_session=True,
                pass_fds=[writing],
            )
        finally:
            os.close(writing)
        if number := failed.read():
            process.wait()
            raise OSError(int(number), os.strerror(int(number)), program.command[0])
    return process


def _group_of(user: str) -> int:
    import pwd

    return pwd.getpwnam(user).pw_gid


def _signal_group(leader: int, number: int) -> bool:
    """Send a signal (0: none) to the processes that `leader` left behind; returns whether there are any."""
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        return False
    return True
