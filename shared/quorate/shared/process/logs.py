"""The logs of a supervisor's programs: a pipe for each, and the process that writes them (`log_keeper`)."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from quorate.shared.process import log_keeper

log = logging.getLogger(__name__)

_RETRY_SECONDS = 5.0
_END_SECONDS = 3.0
"""What the keeper gets to write the rest, once nobody can add to it."""


class Logs:
    """Pipes into log files. Whoever writes to one is never stopped by what happens to the keeper.

    Args:
        files: the log files; their folders are made.
    Raises: OSError: a folder or a pipe cannot be made, or the keeper cannot be started.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._pipes: dict[Path, tuple[int, int]] = {}
        self._keeper: subprocess.Popen[bytes] | None = None
        self._due = 0.0
        for file in files:
            if file not in self._pipes:
                file.parent.mkdir(parents=True, exist_ok=True)
                # Both ends stay open here, or a program would get SIGPIPE while the keeper is away.
                self._pipes[file] = os.pipe()
        if self._pipes:
            self._start()

    def into(self, file: Path) -> int:
        """Return the descriptor that leads into a log file."""
        return self._pipes[file][1]

    def tend(self) -> None:
        """Start the keeper again where it has died."""
        if self._keeper is None or self._keeper.poll() is None or time.monotonic() < self._due:
            return
        log.warning("what writes the logs ended (%d); starting it again", self._keeper.returncode)
        try:
            self._start()
        except OSError as error:
            log.error("what writes the logs cannot be started: %s", error.strerror)

    def close(self) -> None:
        """Let go of the pipes, and wait until what was said is written."""
        self.tend()
        for reading, writing in self._pipes.values():
            os.close(writing)
            os.close(reading)
        if self._keeper is not None:
            try:
                self._keeper.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:  # somebody holds a pipe whom no supervisor can end
                self._keeper.kill()
                self._keeper.wait()

    @contextmanager
    def own(self, file: Path | None) -> Iterator[None]:
        """Lead what this very process says into a log file too, while the block lasts; None: leave it."""
        if file is None:
            yield
            return
        before = [os.dup(number) for number in (1, 2)]
        sys.stdout.flush()
        for number in (1, 2):
            os.dup2(self.into(file), number)
        try:
            yield
        finally:
            sys.stdout.flush()
            for number, earlier in zip((1, 2), before, strict=True):
                os.dup2(earlier, number)
                os.close(earlier)

    def _start(self) -> None:
        self._due = time.monotonic() + _RETRY_SECONDS
        ends = [f"{reading}={file}" for file, (reading, _) in self._pipes.items()]
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", log_keeper.__file__, *ends],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[reading for reading, _ in self._pipes.values()],
            start_new_session=True,
        )
