"""What every user of this machine can read of a federation while it works: the arguments of its processes."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PAUSE = 0.003
_LONG = 20  # characters of a key file's line that make it a secret


class ProcessList:
    """The arguments of a folder's processes, looked at again and again while they come and go.

    Args:
        folder: those belong to it whose arguments or environment name it.
    """

    def __init__(self, folder: Path) -> None:
        self._mark = str(folder)
        self._foreign: set[str] = set()
        self._ours: set[str] = set()
        self._tried: set[str] = set()
        self._done = threading.Event()
        self.arguments: dict[str, list[str]] = {}
        """Command line as one text -> its arguments."""
        self.tokens: dict[str, set[str]] = {}
        """Task token -> the command lines that led to it, which only their own user can follow."""
        self.looks = 0

    @contextmanager
    def watched(self) -> Iterator[ProcessList]:
        """Look while the block runs."""
        thread = threading.Thread(target=self._watch)
        thread.start()
        try:
            yield self
        finally:
            self._done.set()
            thread.join()

    def _watch(self) -> None:
        while not self._done.is_set():
            for entry in Path("/proc").iterdir():
                if entry.name.isdigit() and entry.name not in self._foreign:
                    try:
                        self._look(entry)
                    except (FileNotFoundError, ProcessLookupError):
                        self._ours.discard(entry.name)  # it has ended
            self.looks += 1
            time.sleep(_PAUSE)

    def _look(self, entry: Path) -> None:
        # The arguments first: they may be others in a moment.
        arguments = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        line = " ".join(arguments)
        if entry.name not in self._ours:
            if self._mark not in line and self._mark not in _environment(entry):
                self._foreign.add(entry.name)
                return
            self._ours.add(entry.name)
        self.arguments.setdefault(line, arguments)
        if "--token-file" in arguments and entry.name not in self._tried:
            number = arguments[arguments.index("--token-file") + 1].rpartition("/")[2]
            token = (entry / "fd" / number).read_text()
            self._tried.add(entry.name)
            self.tokens.setdefault(token, set()).add(line)

    def found(self, secrets: set[str]) -> list[str]:
        """Return the command lines that hold one of the secrets, or what looks like a task token."""
        known = secrets | set(self.tokens)
        return [
            line
            for line in self.arguments
            if re.search("[0-9a-f]{128}", line) or any(each in line for each in known)
        ]


def _environment(entry: Path) -> str:
    try:
        return (entry / "environ").read_bytes().decode(errors="replace")
    except PermissionError:  # of another user, or one that keeps debuggers out: then its arguments tell
        return ""


def secrets_in(folder: Path) -> set[str]:
    """Return the secrets in the files of a federation and its sites, as they would stand in arguments."""
    found = set()
    for path in (*folder.rglob("*.key"), *folder.rglob("*.secret")):
        content = path.read_bytes()
        found.add(content.hex())
        lines = content.decode("ascii", errors="ignore").splitlines()
        found |= {line for line in lines if len(line) >= _LONG and not line.startswith("-----")}
    return found
