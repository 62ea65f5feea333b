r"""Regular expressions of a run file, which sites match on names of their models' parts, within bounds.

Python's `re` backtracks: `(.+)+x` takes a time exponential in the length of a name, and holds the interpreter
meanwhile, so that one line of a run file could hang a site. How a pattern is written does not tell: nested
quantifiers are one harmful form, `(a|a)(a|a)(a|a)...` and `.*.*.*.*.*x` are others, and rules against all of
them refuse patterns that are fine. So patterns are first tried on the very names, in a small process with a
limit on its CPU time. What they cost there they cost here too. Names without special characters, which is
what most run files have, match in linear time and start no process.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache

from quorate.shared.errors import ConfigError, QuorateError

LONGEST, MOST = 500, 100
"""Characters of a pattern, and patterns of one field."""
MOST_SECONDS = 0.5
"""CPU time for all patterns of a field on all names of a model; ordinary ones take a few milliseconds."""
_PLAIN = re.compile(r"[\w.]*")
_TRIAL = """
import json, re, signal, sys
seconds, patterns, names = json.load(sys.stdin)
signal.setitimer(signal.ITIMER_VIRTUAL, seconds)  # its signal ends this process
for number, pattern in enumerate(patterns):
    print(number, flush=True)
    for name in names:
        re.fullmatch(pattern, name)
"""


def check_regular(pattern: str) -> str:
    """Return a pattern that is a regular expression of a sane length.

    Raises: ValueError: it is none; says why (pydantic turns this into an error that names the field).
    """
    if len(pattern) > LONGEST:
        raise ValueError(f"{pattern[:40]!r}... has {len(pattern)} characters, more than {LONGEST}")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        message = f"{pattern!r} is not a regular expression ({str(error) or type(error).__name__})"
        raise ValueError(message) from error
    return pattern


def check_cost(field: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Return when these patterns can be matched on these names in a short time.

    Args:
        field: of the run file, for the message.
        patterns: regular expressions.
        names: what each of them is to be matched on, whole.
    Raises: ConfigError: one of them takes too long.
    """
    special = tuple(pattern for pattern in patterns if not _PLAIN.fullmatch(pattern))
    if special:
        _try(field, special, tuple(names))


@lru_cache(maxsize=64)  # a run asks again and again with the same names
def _try(field: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _TRIAL],
        input=json.dumps([MOST_SECONDS, patterns, names]).encode(),
        capture_output=True,
        check=False,
    )
    if done.returncode == 0:
        return
    if done.returncode > 0 or not done.stdout:
        raise QuorateError(f"{field}: its patterns cannot be tried: {done.stderr.decode()[-300:]}")
    raise ConfigError(
        f"{field}: {patterns[int(done.stdout.split()[-1])]!r} takes more than {MOST_SECONDS} s to match the "
        "names of the model's parts; write it without repeats inside repeats, or as a list of name endings.",
        kind="slow-pattern",
    )
