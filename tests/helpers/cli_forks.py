"""The real command line, many times over, for the price of one import of torch: a process that forks.

`Forks` starts this file as a program. It imports everything heavy once, then forks a child for each command
line, which calls the CLI's own entry point. A child that is asked to stops itself at a `Point`: a test says
where a run is killed and nothing has to race.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Point:
    """A moment of a run: the nth call of a function while the run is in that phase of that round.

    Args:
        target: `module:name` of the function.
        phase: what trackers are told; None for any.
        file: only calls whose path (the first argument) has this name.
        when: `before` or `after` the call; `torn` for one that opens a file: half of what is written to it
            gets there.
        signal: what the process sends itself.
    """

    target: str
    round: int | None = None
    phase: str | None = None
    nth: int = 1
    file: str | None = None
    when: str = "before"
    signal: int = signal.SIGKILL

    def interrupt(self) -> Point:
        """The same moment, with Ctrl-C."""
        return replace(self, signal=int(signal.SIGINT))


@dataclass(frozen=True)
class Ended:
    """How a command line ended: its exit code, or -N for signal N, what it said, and how long it took."""

    code: int
    out: str
    err: str
    seconds: float


class Forks:
    """The forking process, as the tests hold it.

    Args:
        folder: where the command lines run, and where what they say is kept.
        env: their environment.
    """

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self._folder = folder
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=pipe, stdout=pipe, text=True, cwd=folder, env=env
        )

    def run(self, *arguments: str, at: Point | None = None, kill_after: float | None = None) -> Ended:
        """Run one command line to its end, to a point, or for so many seconds."""
        assert self._process.stdin is not None and self._process.stdout is not None
        job = {"arguments": arguments, "at": at and asdict(at), "kill_after": kill_after}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        out, err = ((self._folder / name).read_text() for name in ("out.txt", "err.txt"))
        return Ended(answer["code"], out, err, answer["seconds"])

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=60)


# --- In the forking process


def main() -> None:
    """Answer jobs, a line each, until stdin ends."""
    # What the command imports on its way; a run in a child imports whatever is missing here.
    for name in (
        "matplotlib.backends.backend_svg",
        "matplotlib.figure",
        "quorate.deploy.cli",
        "quorate.deploy.console",
        "quorate.deploy.results",
        "quorate.shared.model.lora_model",
        "quorate.simulations.runner",
        "quorate.simulations.simulated_sites",
        "transformers.models.bert.modeling_bert",
    ):
        importlib.import_module(name)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a fork would lose threads"
    # Whoever starts tests in the background has Ctrl-C ignored, which children inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        job, started = json.loads(line), time.monotonic()
        child = os.fork()
        if child == 0:
            _child(job["arguments"], Point(**job["at"]) if job["at"] else None)
        code = _wait(child, job["kill_after"])
        print(json.dumps({"code": code, "seconds": time.monotonic() - started}), flush=True)


def _wait(child: int, kill_after: float | None) -> int:
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)  # one that has ended keeps its number until it is waited for
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _child(arguments: Sequence[str], point: Point | None) -> None:
    """Become `quorate ARGUMENTS`; never returns."""
    code = 1
    try:
        for name, stream in (("out.txt", sys.stdout), ("err.txt", sys.stderr)):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
        if point:
            _arm(point)
        from quorate.deploy.cli import run

        code = run(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _arm(point: Point) -> None:
    """Have this process send itself the signal when the run comes to the point."""
    from quorate.server.rounds.run import Run
    from quorate.server.tracking.events import Event, PhaseBegan

    where: list[Any] = [None, None]
    real_tell = Run.tell

    def tell(self: Run, event: Event) -> None:
        if isinstance(event, PhaseBegan):
            where[:] = event.round, event.name
        real_tell(self, event)

    Run.tell = tell  # type: ignore[method-assign]
    module, _, names = point.target.partition(":")
    *path, name = names.split(".")
    owner: Any = importlib.import_module(module)
    for each in path:
        owner = getattr(owner, each)
    setattr(owner, name, _stopping(point, where, getattr(owner, name)))


def _stopping(point: Point, where: Sequence[Any], real: Callable[..., Any]) -> Callable[..., Any]:
    left = point.nth

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        here = point.round in (None, where[0]) and point.phase in (None, where[1])
        left -= here and (point.file is None or Path(arguments[0]).name == point.file)
        if left != 0:
            return real(*arguments, **options)
        left = -1  # once
        if point.when == "before":
            os.kill(os.getpid(), point.signal)
        try:
            answer = real(*arguments, **options)
        except OSError:
            left = 1  # the removal of what is not there is no moment
            raise
        if point.when == "torn":
            return _Torn(answer, point.signal)
        if point.when == "after":
            os.kill(os.getpid(), point.signal)
        return answer

    return call


class _Torn:
    """An open file in which the process ends half-way through the first write."""

    def __init__(self, stream: Any, number: int) -> None:
        self._stream, self._number = stream, number

    def __enter__(self) -> _Torn:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def fileno(self) -> int:
        return int(self._stream.fileno())

    def write(self, content: Any) -> None:
        self._stream.write(content[: len(content) // 2])
        self._stream.flush()
        os.kill(os.getpid(), self._number)
        raise AssertionError("the signal did not come")


if __name__ == "__main__":
    main()
