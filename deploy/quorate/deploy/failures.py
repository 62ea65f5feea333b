"""From an exception to one message on stderr and an exit code."""

from __future__ import annotations

import errno
import sys
import tempfile
import traceback

from quorate.shared.errors import QuorateError

DONE, INTERNAL, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

_REMEDIES = {
    errno.ENOSPC: "free some space, or write elsewhere with -o; a run goes on with --resume",
    errno.EDQUOT: "your quota is used up: free some space, or write elsewhere with -o",
    errno.EACCES: "get the right to it, or choose another place",
    errno.EPERM: "get the right to it, or choose another place",
    errno.EROFS: "this file system is read-only: write elsewhere with -o",
}


def report_failure(error: Exception, *, show_traceback: bool) -> int:
    """Say in one message what went wrong; returns the exit code.

    Args:
        show_traceback: print the traceback of an internal error too.
    """
    if isinstance(error, QuorateError):
        _say(f"{type(error).__name__}: {error}")
        return error.exit_code
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        at = f"{error.filename}: " if error.filename else ""
        _say(f"OutputError: {at}{error.strerror}; {_REMEDIES[error.errno]}.")
        return BAD_INPUT
    return _internal(error, show_traceback=show_traceback)


def _internal(error: Exception, *, show_traceback: bool) -> int:
    text = "".join(traceback.format_exception(error))
    last = traceback.extract_tb(error.__traceback__)[-1]
    # The exception's own words may quote a row, so they go to the log, which its owner alone can read.
    where = f"{type(error).__name__} in {last.filename}:{last.lineno}"
    hint = ""
    if type(error).__name__ == "OutOfMemoryError":
        hint = " Memory ran out: lower training.per_device_train_batch_size or training.max_stack."
    if show_traceback:
        _say(text.rstrip())
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="quorate-", suffix=".log", delete=False, encoding="utf-8"
        ) as log:
            log.write(text)
        _say(f"internal error: {where}; the traceback is in {log.name}. Please report it.{hint}")
    except OSError as problem:
        _say(f"internal error: {where}; no traceback could be written ({problem.strerror}).{hint}")
    return INTERNAL


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
