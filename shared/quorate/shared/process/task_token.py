"""Task tokens by file descriptor: what stands in a process's arguments, every user of the machine can read.

With its token anybody can take a task of Flower's and answer it. Flower's SuperExec gives the token as an
argument; here it lies in memory that only a descriptor leads to, and the argument names the descriptor:

    flwr-clientapp --token-file /proc/self/fd/7

The kernel opens it to processes of the same user alone, and nothing of it is ever on disk.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from quorate.shared.errors import QuorateError

TOKEN, TOKEN_FILE = "--token", "--token-file"
"""Options of all programs that Flower starts for a task."""
_USED = ("subprocess", "Popen")


def install(executor: ModuleType) -> None:
    """Have Flower's executor start its programs without the token in their arguments.

    Args:
        executor: Flower's module that starts a process for a task.
    Raises: QuorateError: this version of Flower starts programs in another way; it must not start any then.
    """
    launch = getattr(getattr(executor, "SubprocessExecutor", None), "launch", None)
    names = launch.__code__.co_names if launch is not None else ()
    if missing := [name for name in _USED if name not in names]:
        raise _moved(f"no longer uses {', '.join(missing)}", "moved-launch")
    # Nothing else of `subprocess` is there: another way to start a process is an error, not a leak.
    executor.__dict__["subprocess"] = SimpleNamespace(Popen=_start, DEVNULL=subprocess.DEVNULL)


def _start(arguments: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    if list(arguments).count(TOKEN) != 1 or arguments[-1] == TOKEN:
        raise _moved(f"no longer gives {TOKEN} to {arguments[0]}", "no-token")
    at = list(arguments).index(TOKEN)
    token = arguments[at + 1]
    with _in_memory(token) as descriptor:
        hidden = [*arguments[:at], TOKEN_FILE, f"/proc/self/fd/{descriptor}", *arguments[at + 2 :]]
        if any(token in each for each in hidden):
            raise _moved(f"gives the token to {arguments[0]} twice", "token-twice")
        return subprocess.Popen(hidden, pass_fds=[descriptor], **options)


@contextmanager
def _in_memory(token: str) -> Iterator[int]:
    """Yield a descriptor of a file without a name that holds the token; a child keeps its own copy of it."""
    descriptor = os.memfd_create("task-token")
    try:
        os.fchmod(descriptor, 0o600)
        os.write(descriptor, token.encode("ascii"))
        yield descriptor
    finally:
        os.close(descriptor)


def read(path: str) -> str:
    """Return the token that `--token-file` names. Raises: OSError."""
    return Path(path).read_text(encoding="ascii").strip()


def _moved(how: str, kind: str) -> QuorateError:
    return QuorateError(
        f"this version of flwr {how}, so a task's token could be read in the process list; "
        "install the version that quorate asks for.",
        kind=kind,
    )
