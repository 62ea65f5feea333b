"""Rows that are the same, or nearly, within a split and across splits."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from hashlib import sha256
from itertools import pairwise
from typing import Any

from quorate.shared.protocol.messages import Split
from quorate.shared.tasks.task import Kind, Row, Task

Words = frozenset[tuple[str, ...]]
THRESHOLD = 0.8
"""Two texts whose pairs of neighbouring words overlap by this much (Jaccard) are nearly the same."""
TARGETS: tuple[Kind, ...] = ("label", "number", "tags", "objects")
"""Kinds of column that are to be learnt; the others are what the model is given."""
_WORD = re.compile(r"\w+")


def shingles(text: str) -> Words:
    """Return a text's pairs of neighbouring words, case and punctuation aside; of one word, the word."""
    words = _WORD.findall(text.casefold())
    return frozenset(pairwise(words)) or frozenset((word,) for word in words)


def groups(keys: Sequence[Hashable]) -> list[list[int]]:
    """Return the indices of keys that occur more than once, together, in order of their first."""
    found: dict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        found[key].append(index)
    return [members for members in found.values() if len(members) > 1]


def near_pairs(sets: Sequence[Words], threshold: float = THRESHOLD) -> Iterator[tuple[int, int]]:
    """Yield every pair of sets whose Jaccard similarity is at least `threshold`, none left out; i < j.

    Only sets that share one of their rarest members are compared: similar sets must share one among so many
    (prefix filtering).

    Source: Bayardo, Ma, Srikant 2007, "Scaling up all pairs similarity search", WWW.
    """
    frequency = Counter(member for members in sets for member in members)
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index in sorted((i for i, members in enumerate(sets) if members), key=lambda i: len(sets[i])):
        members = sets[index]
        rarest = sorted(members, key=lambda member: (frequency[member], member))
        prefix = rarest[: len(members) - math.ceil(threshold * len(members) - 1e-9) + 1]
        candidates = {other for member in prefix for other in holders[member]}
        for other in sorted(candidates):
            if len(sets[other]) < threshold * len(members) - 1e-9:
                continue
            shared = len(members & sets[other])
            if shared >= threshold * (len(members) + len(sets[other]) - shared) - 1e-9:
                yield min(index, other), max(index, other)
        for member in prefix:
            holders[member].append(index)


def near_rows(rows: Sequence[tuple[Split, Row]], task: Task) -> list[tuple[int, int]]:
    """Return pairs of rows with nearly the same texts (exactly the same ones among them)."""
    columns = [name for name, kind in task.columns.items() if kind in ("text", "tokens")]
    if not columns:
        return []
    texts = [" ".join(_text(row.values[name]) for name in columns) for _, row in rows]
    # Texts that are the same are compared once: thousands of copies have millions of pairs.
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        first.setdefault(text, index)
    places = list(first.values())
    copies = [(members[0], other) for members in groups(texts) for other in members[1:]]
    pairs = [(places[a], places[b]) for a, b in near_pairs([shingles(texts[i]) for i in places])]
    return pairs + copies


def _text(value: Any) -> str:
    return value if isinstance(value, str) else " ".join(map(str, value))


def input_key(row: Row, task: Task) -> str | None:
    """Return what the model is given of a row; None where the task has targets alone."""
    inputs = {name: row.values[name] for name, kind in task.columns.items() if kind not in TARGETS}
    return json.dumps(inputs, sort_keys=True, default=_digest) if inputs else None


def _digest(value: Any) -> str:
    return sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


def repeats(
    splits: Sequence[Split], keys: Sequence[str | None], near: Sequence[tuple[int, int]]
) -> dict[Split, tuple[int, int]]:
    """Return split -> (rows that repeat one before exactly, rows that do so nearly)."""
    counts: dict[Split, tuple[int, int]] = {}
    later = {max(a, b) for a, b in near if splits[a] == splits[b]}
    for split in dict.fromkeys(splits):
        members = [i for i, each in enumerate(splits) if each == split]
        repeated = {
            members[other] for group in groups([keys[i] for i in members]) for other in group[1:]
        } if members and keys[members[0]] is not None else set()  # fmt: skip
        counts[split] = len(repeated), len({i for i in later if splits[i] == split} - repeated)
    return counts
