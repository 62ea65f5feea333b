"""The two consoles: results on stdout, everything else on stderr."""

from __future__ import annotations

import os
import sys
from functools import cache

from rich.console import Console

_PLAIN_WIDTH = 110


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    if stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        return Console(stderr=stderr, highlight=False)
    # A file or a pipe has no width; wrapped lines would be harder to read and to search than long ones.
    return Console(stderr=stderr, highlight=False, force_terminal=False, no_color=True, width=_PLAIN_WIDTH)


@cache
def stdout_console() -> Console:
    """Return the console for results. Colours and cursor moves on a terminal alone; NO_COLOR is respected."""
    return _console(stderr=False)


@cache
def stderr_console() -> Console:
    """Return the console for progress, log messages and errors."""
    return _console(stderr=True)
