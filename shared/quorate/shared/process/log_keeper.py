"""Writes what programs say to their log files: a time before each line, files of bounded size and number.

`python -I -S log_keeper.py FD=FILE ...` reads the pipes that it has inherited until nobody can write to them
any more. The supervisor keeps both ends of each pipe open, so that this process may be killed and started
anew without any program's noticing; where the supervisor is killed, its programs' last words are written.

    FILE               written to now
    FILE.1 ... FILE.4  what it held before, the newest first

Standard library alone: there is one such process beside every supervisor, and it stays small.
"""

from __future__ import annotations

import os
import re
import selectors
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

MAX_BYTES = 10 * 2**20
"""Size at which a file gives way to the next."""
FILES = 5
"""Files of one log, with the one that is written to."""
_LONGEST_LINE = 64 * 2**10
_PATIENCE_SECONDS = 1.0
"""How long half a line waits for its end."""
# As `logging` and nginx write times: whoever has said when needs no other time.
_TIMED = re.compile(rb"\d{4}[-/]\d\d[-/]\d\d[ T]\d\d:\d\d:\d\d")


class LogFile:
    """A file that lines are appended to, and that gives way to a new one in time.

    A full disk loses lines and stops nobody: how many were lost is written once there is room.

    Args:
        path: the file, made with mode 0600.
        max_bytes: its largest size.
        files: how many there may be, earlier ones included.
    """

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES, files: int = FILES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._files = files
        self._descriptor: int | None = None
        self._lost = 0
        self._torn = False

    def write(self, content: bytes) -> None:
        try:
            if self._lost:
                note = f"{_now()} {self._lost} lines before this one could not be written\n".encode()
                self._append(b"\n" * self._torn + note)
                self._lost, self._torn = 0, False
            self._append(content)
        except OSError:
            self._lost += content.count(b"\n")

    def _append(self, content: bytes) -> None:
        descriptor = self._open()
        if os.fstat(descriptor).st_size + len(content) > self._max_bytes:
            self._rotate()
            descriptor = self._open()
        while content:
            done = os.write(descriptor, content)
            content = content[done:]
            self._torn = bool(content)

    def _open(self) -> int:
        """Return the file under its name: somebody else may have moved the one we had."""
        if self._descriptor is not None:
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._descriptor), self._path.stat()):
                    return self._descriptor
            self._close()
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        return self._descriptor

    def _rotate(self) -> None:
        self._close()
        names = [self._path, *(Path(f"{self._path}.{number}") for number in range(1, self._files))]
        for older, newer in reversed(list(zip(names[1:], names[:-1], strict=True))):
            with suppress(FileNotFoundError):
                newer.replace(older)

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Stream:
    """What comes through one pipe.

    Args:
        file: where its lines go.
    """

    def __init__(self, file: LogFile) -> None:
        self._file = file
        self._half = b""
        self._since = 0.0

    def take(self, data: bytes) -> None:
        """Write the whole lines, and keep the half one."""
        *lines, self._half = (self._half + data).split(b"\n")
        if len(self._half) > _LONGEST_LINE:
            lines, self._half = [*lines, self._half], b""
        self._since = time.monotonic()
        self._write(lines)

    def settle(self, patience: float = 0.0) -> bool:
        """Write half a line whose end does not come; returns whether one still waits."""
        if self._half and time.monotonic() - self._since >= patience:
            half, self._half = self._half, b""
            self._write([half])
        return bool(self._half)

    def _write(self, lines: Sequence[bytes]) -> None:
        if lines:
            now = f"{_now()} ".encode()
            self._file.write(b"".join((b"" if _TIMED.match(line) else now) + line + b"\n" for line in lines))


def keep(pipes: Sequence[tuple[int, LogFile]]) -> None:
    """Write what comes through the pipes (descriptor, file) until all of them have ended."""
    streams: dict[int, Stream] = {}
    with selectors.DefaultSelector() as selector:
        for descriptor, file in pipes:
            streams[descriptor] = Stream(file)
            file.write(b"")  # so that it is there for whoever is sent to look into it
            selector.register(descriptor, selectors.EVENT_READ)
        waiting = False
        while streams:
            for key, _ in selector.select(_PATIENCE_SECONDS if waiting else None):
                if data := os.read(key.fd, 2**16):
                    streams[key.fd].take(data)
                else:
                    selector.unregister(key.fd)
                    streams.pop(key.fd).settle()
            waiting = any([stream.settle(_PATIENCE_SECONDS) for stream in streams.values()])


def _now() -> str:
    now = time.time()
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now))},{int(now % 1 * 1000):03d}"


def main(arguments: Sequence[str]) -> None:
    """Keep the logs that the arguments name."""
    # systemd and Ctrl-C mean all processes of a group: the programs' last words are still to come.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    pairs = [each.partition("=") for each in arguments]
    keep([(int(descriptor), LogFile(Path(path))) for descriptor, _, path in pairs])


if __name__ == "__main__":
    main(sys.argv[1:])
