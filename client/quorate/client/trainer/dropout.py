"""Dropout masks that padding does not change: an entry follows from key and place.

A generator's stream would not do: how far it has run at an entry depends on the sizes of all axes, and which
of them is padded (to the longest row of another site, or not at all) is known to the model alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LANES = 4
"""Entries that share a word of 64 bits: 16 bits for each."""
_STEPS = 2**16
# Of SplitMix64 (Steele, Lea, Flood 2014, doi:10.1145/2714064.2660195), as signed numbers.
_GOLDEN, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


def draw_keys(generator: torch.Generator, rows: int) -> Tensor:
    """Draw a key for each row, int64 [rows]."""
    low, high = -(2**63), 2**63 - 1
    return torch.randint(low, high, (rows,), generator=generator, device=generator.device)


def kept(keys: Tensor, shape: Sequence[int], p: float, *, from_end: bool = False) -> Tensor:
    """Return which entries are kept, bool [rows, *shape]; each is dropped by itself, with probability p.

    Args:
        keys: one for each row, int64 [rows].
        shape: of a row. A row of a larger shape has the same mask where both have entries.
        p: from 0 to below 1, rounded to a multiple of `1 / 65536`.
        from_end: count places from the end of each axis but the last, for rows that are padded in front.
    """
    *outer, last = shape
    words = keys
    for size in outer:
        words = _mixed(words, size)
        words = words.flip(-1) if from_end else words
    bits = _mixed(words, -(-last // _LANES)).view(torch.int16)[..., :last]
    return bits >= _dropped(p) - _STEPS // 2


def keep_probability(p: float) -> float:
    """Return the exact probability with which `kept` keeps an entry."""
    return 1 - _dropped(p) / _STEPS


def _dropped(p: float) -> int:
    return min(round(p * _STEPS), _STEPS - 1)


def _mixed(words: Tensor, size: int) -> Tensor:
    """Return the words of the places along one more axis, [..., size]: SplitMix64's stream of each word."""
    mixed = words[..., None] + torch.arange(1, size + 1, device=words.device) * _GOLDEN
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        shifted = mixed >> shift
        shifted &= (1 << (64 - shift)) - 1  # a shift of signed numbers copies the sign
        mixed ^= shifted
        mixed *= factor
    return mixed
