"""Token sequences to learn from: which tokens are learnt, how long ones are cut, several joined in one row.

A sequence is (ids, labels): a label is the token's own id where the token is learnt, else IGNORED. The first
token is never learnt, for nothing comes before it that it could be predicted from.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import cycle, islice
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from quorate.shared.tasks.task import Batch, Example

IGNORED = -100
"""Label of a token whose loss does not count, as in torch and transformers."""
LEAST_CONTEXT = 4
"""A prompt that is cut keeps at least one part in so many of the longest length."""
Ids = list[int]
T = TypeVar("T")


def learnt(mask: Sequence[int], ids: Ids) -> Ids:
    """Return labels from a mask of the tokens that are learnt."""
    return [
        token if taught and at else IGNORED for at, (token, taught) in enumerate(zip(ids, mask, strict=True))
    ]


def cut(ids: Ids, labels: Ids, max_length: int, bos: int | None) -> tuple[Ids, Ids]:
    """Cut a sequence to `max_length` tokens, in two steps, so that something is left to learn.

    First what comes before the first learnt token is cut from its left (a begin-of-text token stays), as far
    as needed, but not below max_length / LEAST_CONTEXT tokens: an answer is no use without its question.
    Then the end is cut.
    """
    over = len(ids) - max_length
    if over <= 0:
        return ids, labels
    context = next(at for at, label in enumerate(labels) if label != IGNORED)
    dropped = min(over, context - min(context, max(1, max_length // LEAST_CONTEXT)))
    first = 1 if dropped and ids[0] == bos else 0
    keep = [*range(first), *range(first + dropped, len(ids))][:max_length]
    return [ids[at] for at in keep], [labels[at] for at in keep]


def bins(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Share sequences out over rows of at most `max_length` tokens: best fit, longest first.

    Returns: per row the indices of its sequences, in order; rows by their first one.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens free, row), sorted
    for index in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        at = bisect_left(room, (lengths[index], -1))
        free, row = room.pop(at) if at < len(room) else (max_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(room, (free - lengths[index], row))
    return sorted(sorted(row) for row in rows)


def apart(lengths: Sequence[Sequence[int]], width: int) -> tuple[Tensor, Tensor]:
    """Return position ids and an attention mask that keep the sequences of a row apart.

    Args:
        lengths: per row the lengths of its sequences; the rest of `width` is padding.
    Returns: position ids [rows, width], each sequence from 0; additive mask [rows, 1, width, width], 0 where
        a token may look and the least float elsewhere. transformers hands a 4D mask on as it is, to sdpa and
        eager attention alike. Padding looks at padding, so that no row of it is empty.
    """
    sequence = torch.full((len(lengths), width), -1)
    positions = torch.zeros((len(lengths), width), dtype=torch.long)
    for row, parts in enumerate(lengths):
        start = 0
        for number, length in enumerate(parts):
            sequence[row, start : start + length] = number
            positions[row, start : start + length] = torch.arange(length)
            start += length
    seen = (sequence[:, :, None] == sequence[:, None, :]).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return positions, mask[:, None]


def joined(examples: Sequence[Example]) -> Example:
    """Return one example of several, one behind the other; `lengths` says where each ends."""
    features = [example.features for example in examples]
    return Example(
        {
            "input_ids": [token for each in features for token in each["input_ids"]],
            "lengths": [length for each in features for length in each["lengths"]],
            "cut": sum(each.get("cut", 0) for each in features),
        },
        [label for example in examples for label in (IGNORED, *example.target[1:])],
    )


def stretched(values: Sequence[T], size: int) -> list[T]:
    """Return `size` values: the first and the last as they are, and those between them again and again."""
    within = values[1:-1] or values
    return [*values[:1], *islice(cycle(within), max(0, size - 2)), *values[-1:]][:size]


def count_learnt(labels: Sequence[int]) -> int:
    """Return how many tokens are learnt."""
    return sum(label != IGNORED for label in labels)


def nll(logits: Tensor, batch: Batch) -> Tensor:
    """Return -log p of each learnt token by those before it, 0 elsewhere, [rows, tokens - 1] in float32."""
    labels = batch.targets[:, 1:]
    taught = labels != IGNORED
    found = functional.cross_entropy(logits[:, :-1][taught].float(), labels[taught], reduction="none")
    return torch.zeros(labels.shape, device=found.device).masked_scatter(taught, found)
