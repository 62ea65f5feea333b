"""Numbers in words, one way throughout: shares in %, differences in points, decimal bytes, whole seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

SHARES = frozenset(
    {
        "accuracy",
        "macro_f1",
        "micro_f1",
        "exact_match",
        "precision",
        "recall",
        "f1",
        "token_accuracy",
        "map",
        "map_50",
        "map_75",
        "ap",
        "ap50",
    }
)
"""Metrics between 0 and 1, shown in %."""

_NAMES = {
    "accuracy": "Accuracy",
    "macro_f1": "Macro-F1",
    "micro_f1": "Micro-F1",
    "exact_match": "All labels right",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
    "map": "mAP",
    "map_50": "mAP at overlap 0.5",
    "map_75": "mAP at overlap 0.75",
    "loss": "Loss",
    "support": "Rows",
}

MEANINGS = {
    "accuracy": "the share of rows that got the right label",
    "exact_match": "the share of rows whose labels are all right and none too many",
    "f1": "F1 (balance of false alarms and misses) over all entities; one is found if its type and both its "
    "ends are right",
    "macro_f1": "F1 (balance of false alarms and misses) averaged over classes, rare ones counting as much "
    "as common ones",
    "micro_f1": "F1 (balance of false alarms and misses) over all labels of all rows together",
    "map": "COCO's mean average precision: boxes found, told apart and placed, over labels and over overlaps "
    "of 0.5 to 0.95",
    "perplexity": "among how many equally likely next tokens the model is undecided; lower is better",
    "token_accuracy": "the share of tokens that the model held for the likeliest",
    "loss": "how surprised the model is by the right answer; lower is better",
}

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def metric_name(metric: str) -> str:
    """Return a metric's name as people write it."""
    return _NAMES.get(metric) or metric.replace("_", " ").capitalize()


def metric_in_sentence(metric: str) -> str:
    """Return a metric's name inside a sentence: `accuracy`, but `macro-F1`."""
    name = metric_name(metric)
    return name[:1].lower() + name[1:]


def number(value: Any) -> float | None:
    """Return a finite number, or None for what is none (absent, NaN, infinite, not a number)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def bounds(value: Any) -> tuple[float, float] | None:
    """Return an interval [low, high], or None for what is none."""
    if not isinstance(value, Sequence) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else (low, high)


def show(metric: str, value: float | None) -> str:
    """Write one value of a metric."""
    if value is None:
        return DASH
    return f"{100 * value:.1f}\u00a0%" if metric in SHARES else f"{value:.3g}"


def show_interval(metric: str, interval: tuple[float, float] | None) -> str:
    """Write an interval, without the unit where `show` has just written it; empty when there is none."""
    if interval is None:
        return ""
    low, high = interval
    if metric in SHARES:
        return f"{100 * low:.1f}{DASH}{100 * high:.1f}"
    return f"{low:.3g}{DASH}{high:.3g}"


def sign(metric: str, gain: float) -> int:
    """Return -1, 0 or 1; a difference that is shown as 0.0 points is none."""
    seen = round(100 * gain, 1) if metric in SHARES else gain
    return (seen > 0) - (seen < 0)


def show_gain(metric: str, gain: float, *, unit: bool = True) -> str:
    """Write a difference with its sign; for shares in percentage points."""
    mark = {-1: MINUS, 0: "±", 1: "+"}[sign(metric, gain)]
    if metric not in SHARES:
        return f"{mark}{abs(gain):.3g}"
    return f"{mark}{100 * abs(gain):.1f}" + (" points" if unit else "")


def show_bytes(count: float) -> str:
    """Write a number of bytes in decimal units."""
    for unit in ("B", "kB", "MB"):  # noqa: B007 - the unit is wanted where the loop stops
        if count < 999.5:
            break
        count /= 1000
    else:
        unit = "GB"
    return f"{count:.0f}\u00a0{unit}" if unit == "B" or count >= 99.95 else f"{count:.1f}\u00a0{unit}"


def show_seconds(seconds: float) -> str:
    """Write a duration as a person would say it."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f}\u00a0ms"
    if seconds < 9.95:
        return f"{seconds:.1f}\u00a0s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}\u00a0s"
    if whole < 3600:
        return f"{whole // 60}\u00a0min {whole % 60}\u00a0s"
    return f"{whole // 3600}\u00a0h {whole % 3600 // 60}\u00a0min"


def count(value: int, one: str, many: str | None = None) -> str:
    """Write `1 site`, `2 sites`, `2,115 rows`."""
    return f"{value:,}\u00a0{one if value == 1 else many or one + 's'}"


def listed(names: Sequence[str], limit: int = 6) -> str:
    """Write `a`, `a and b`, `a, b and c`; beyond `limit` names, how many more there are."""
    names = list(names)
    if len(names) > limit:
        names = [*names[: limit - 1], f"{len(names) - limit + 1} more"]
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def spans(rounds: Sequence[int]) -> str:
    """Write rounds with neighbours joined: `1, 4-6` (with an en dash)."""
    parts: list[list[int]] = []
    for each in sorted(rounds):
        if parts and each == parts[-1][-1] + 1:
            parts[-1].append(each)
        else:
            parts.append([each])
    return ", ".join(f"{p[0]}" if len(p) == 1 else f"{p[0]}{DASH}{p[-1]}" for p in parts)
