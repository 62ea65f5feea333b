"""Figures of a guarantee as people read them: what is shown never promises more than what holds.

An epsilon or a delta is rounded up, a lower bound (what an audit found, what is left of a budget) down.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

_EPSILON_DIGITS, _DELTA_DIGITS = 3, 2


def at_most(value: float, digits: int = _EPSILON_DIGITS) -> str:
    """Return an upper bound, such as an epsilon, rounded up to so many significant digits."""
    return _rounded(value, digits, ROUND_CEILING)


def at_least(value: float, digits: int = _EPSILON_DIGITS) -> str:
    """Return a lower bound, rounded down to so many significant digits."""
    return _rounded(value, digits, ROUND_FLOOR)


def delta_shown(value: float) -> str:
    """Return a delta with two significant digits, rounded up."""
    return at_most(value, _DELTA_DIGITS)


def _rounded(value: float, digits: int, rounding: str) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    # By the shortest digits that stand for this float: those that it was written with, so that 1e-5 stays so.
    exact = Decimal(repr(float(value)))
    place = Decimal((0, (1,), exact.adjusted() - digits + 1))
    return f"{float(exact.quantize(place, rounding)):.{digits}g}"
