"""The two consoles: results on stdout, everything else on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from functools import cache

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

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


def table_of(columns: Sequence[str], rows: Iterable[Iterable[str | Text]], title: str | None = None) -> Table:
    """Return a table; no cell of it is taken for markup. One with a title has figures, set to the right."""
    table = Table(*columns, box=SIMPLE, title=None if title is None else Text(title))
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    for column in table.columns[1:] if title is not None else ():
        column.justify = "right"
    return table


def print_line(console: Console, text: str) -> None:
    """Print words as they are, on one line however long it is."""
    console.print(text, markup=False, soft_wrap=True)


def print_table(columns: Sequence[str], rows: Iterable[Iterable[str | Text]]) -> None:
    """Print a table of results."""
    stdout_console().print(table_of(columns, rows))
