"""Whether a SuperNode reaches the server: a small file that the SuperNode writes and `site status` reads."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quorate.shared.errors import OutputError
from quorate.shared.process.files import BY_UMASK, write_atomically

State = Literal["connected", "unreachable", "refused"]
SILENT_SECONDS = 90.0
"""A SuperNode asks every 3 s, and sends a heartbeat every 30 s while a message is worked on."""


@dataclass(frozen=True)
class ConnectionState:
    """What the file says.

    Args:
        state: outcome of the last request.
        detail: an exception's name, or an HTTP status; never a text.
        since: when it became so [Unix time].
        last: when the last request ended [Unix time].
    """

    state: State
    detail: str
    since: float
    last: float


class Contact:
    """Writes the file; its time of change is that of the last request."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()  # the heartbeat has a thread of its own
        self._now: tuple[str, str] | None = None

    def note(self, state: State, detail: str, at: float) -> None:
        """Note the outcome of a request. A file that cannot be written never stops the SuperNode."""
        with self._lock, contextlib.suppress(OSError, OutputError):
            if self._now != (state, detail):
                said = json.dumps({"state": state, "detail": detail, "since": at})
                write_atomically(self._path, said, BY_UMASK)
                self._now = (state, detail)
            os.utime(self._path, (at, at))


def read_connection_state(path: Path) -> ConnectionState | None:
    """Return what the SuperNode noted last; None when it noted nothing yet."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return ConnectionState(content["state"], content["detail"], content["since"], path.stat().st_mtime)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def silent(last: float) -> bool:
    """Return whether the last request is so long ago that the connection must be held for lost."""
    return time.time() - last > SILENT_SECONDS
