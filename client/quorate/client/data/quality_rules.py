"""What there is to look at in each kind of column. A new kind of data adds one function to `INSPECTORS`."""

from __future__ import annotations

import io
import statistics
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from quorate.shared.tasks.task import Kind, Row, Task

_EXAMPLES = 3
"""Rows that are named with a finding."""
_FAR = 3.0
"""Interquartile ranges beyond the quartiles from which a number is an outlier (Tukey's outer fence)."""


class Report(BaseModel):
    """Base of the parts of a report."""

    model_config = ConfigDict(frozen=True)


class Finding(Report):
    """Something to look at."""

    level: Literal["error", "warning"]
    """An error would stop a run."""
    text: str
    rows: list[str] = []
    """The first rows it is about, `file:line`."""


Facts = dict[str, dict[str, Any]]
Inspector = Callable[[Sequence[str], Sequence[Row], Task, Any], tuple[Facts, list[Finding]]]
"""(columns of the kind, rows of one split, task, processor or None) -> facts by name, and findings."""


def inspect_texts(
    columns: Sequence[str], rows: Sequence[Row], task: Task, processor: Any
) -> tuple[Facts, list[Finding]]:
    """Measure lengths against the task's limit, and look for damaged characters."""
    texts = [[str(row.values[name]) for name in columns] for row in rows]
    findings = _damaged(texts, rows)
    facts: Facts = {"characters": _spread([sum(map(len, each)) for each in texts])}
    if processor is not None:
        lengths = np.zeros(len(rows), dtype=np.int64)
        for position in range(len(columns)):
            # Only the first brings the special tokens of the whole.
            encoded = processor(
                [each[position] for each in texts],
                add_special_tokens=position == 0,
                truncation=False,
                verbose=False,
            )
            lengths += [len(ids) for ids in encoded["input_ids"]]
        facts["tokens"], more = _against_limit(lengths.tolist(), rows, task)
        findings += more
    return facts, findings


def inspect_words(
    columns: Sequence[str], rows: Sequence[Row], task: Task, processor: Any
) -> tuple[Facts, list[Finding]]:
    """Measure lists of words, in words and in tokens."""
    words = [[word for name in columns for word in row.values[name]] for row in rows]
    facts: Facts = {"words": _spread(list(map(len, words)))}
    findings = _damaged(words, rows)
    if processor is not None:
        encoded = processor(words, is_split_into_words=True, truncation=False, verbose=False)
        facts["tokens"], more = _against_limit([len(ids) for ids in encoded["input_ids"]], rows, task)
        findings += more
    return facts, findings


def inspect_numbers(
    columns: Sequence[str], rows: Sequence[Row], task: Task, processor: Any
) -> tuple[Facts, list[Finding]]:
    """Give range and spread of numbers, and name those far from the rest."""
    facts: Facts = {}
    findings: list[Finding] = []
    for name in columns:
        values = np.array([row.values[name] for row in rows], dtype=np.float64)
        low, high = np.percentile(values, (25, 75))
        fence = _FAR * (high - low)
        beyond = (values < low - fence) | (values > high + fence)
        far: list[int] = np.flatnonzero(beyond).tolist() if fence > 0 else []
        mean, deviation = float(values.mean()), float(values.std())
        facts[name] = {
            "min": float(values.min()),
            "max": float(values.max()),
            "mean": mean,
            "std": deviation,
            "outliers": len(far),
        }
        if far:
            text = f"{len(far)} values of {name} are far from the rest (beyond {_FAR:g} interquartile ranges)"
            findings.append(warning(text, [rows[i].source for i in far]))
        centre, scale = getattr(task, "target_mean", None), getattr(task, "target_scale", None)
        if centre is None or not scale or not deviation:
            continue
        if abs(mean - centre) > scale or not 1 / 3 < deviation / scale < 3:
            text = (
                f"{name} has mean {mean:.3g} and standard deviation {deviation:.3g}, the task expects about "
                f"{centre:.3g} and {scale:.3g} (task.target_mean, task.target_scale)"
            )
            findings.append(warning(text))
    return facts, findings


def inspect_images(
    columns: Sequence[str], rows: Sequence[Row], task: Task, processor: Any
) -> tuple[Facts, list[Finding]]:
    """Open every image: sizes, modes, and those that cannot be read."""
    from PIL import Image

    widths, heights, modes, broken = [], [], Counter[str](), []
    for row in rows:
        for name in columns:
            value = row.values[name]
            try:
                with Image.open(io.BytesIO(value) if isinstance(value, bytes) else Path(value)) as image:
                    image.load()
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                broken.append(row.source)
                continue
            widths.append(image.width)
            heights.append(image.height)
            modes[image.mode] += 1
    findings = []
    if broken:
        text = f"{len(broken)} images cannot be read; replace them or remove the rows"
        findings.append(Finding(level="error", text=text, rows=broken[:_EXAMPLES]))
    if len(modes) > 1:
        findings.append(warning(f"images of {len(modes)} modes: {', '.join(sorted(modes))}"))
    return {"width": _spread(widths), "height": _spread(heights), "modes": dict(modes)}, findings


INSPECTORS: dict[Kind, Inspector] = {
    "text": inspect_texts,
    "tokens": inspect_words,
    "number": inspect_numbers,
    "image": inspect_images,
}


def _spread(values: Sequence[int]) -> dict[str, Any]:
    if not values:
        return {}
    return {
        "min": min(values),
        "median": statistics.median(values),
        "p95": float(np.percentile(values, 95)),
        "max": max(values),
    }


def _against_limit(
    lengths: Sequence[int], rows: Sequence[Row], task: Task
) -> tuple[dict[str, Any], list[Finding]]:
    facts, limit = _spread(lengths), getattr(task, "max_length", None)
    if limit is None or not lengths:
        return facts, []
    cut = [i for i, length in enumerate(lengths) if length > limit]
    facts = {**facts, "limit": limit, "cut": len(cut), "share_cut": len(cut) / len(lengths)}
    if not cut:
        return facts, []
    share = 100 * len(cut) / len(lengths)
    text = f"{len(cut)} texts ({share:.1f} %) are longer than task.max_length {limit} and are cut"
    return facts, [warning(text, [rows[i].source for i in cut])]


def _damaged(texts: Sequence[Sequence[str]], rows: Sequence[Row]) -> list[Finding]:
    """Find characters that a wrong encoding left behind."""
    findings = []
    for what, wrong in (
        ("hold U+FFFD, where a character was lost when the file was converted", _lost),
        ("look like UTF-8 that was read as Windows-1252 (an accent became two characters)", _misread),
        ("hold control characters", _control),
    ):
        found = [row.source for each, row in zip(texts, rows, strict=True) if any(map(wrong, each))]
        if found:
            findings.append(warning(f"{len(found)} texts {what}", found))
    return findings


def _lost(text: str) -> bool:
    return "\ufffd" in text


def _misread(text: str) -> bool:
    if text.isascii():
        return False
    return any(_is_misread(word) for word in text.split() if not word.isascii())


def _is_misread(word: str) -> bool:
    try:
        return word.encode("cp1252").decode("utf-8") != word
    except UnicodeError:
        return False


def _control(text: str) -> bool:
    if text.isprintable():
        return False
    return any(unicodedata.category(each) == "Cc" and each not in "\t\n\r" for each in text)


def warning(text: str, rows: Sequence[str] = ()) -> Finding:
    """Return a finding that stops no run, with the first of the rows that it is about."""
    return Finding(level="warning", text=text, rows=list(rows[:_EXAMPLES]))
