"""Sentences as words: how a text is split into them, and where a tokenizer put each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

NO_PIECE, CUT = -1, -2
"""Instead of a place: a word that the tokenizer drops, and one beyond the model's input."""
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Words:
    """A sentence's words.

    Args:
        tags: a label id per word.
        places: the position of each word's first piece in the model's input, or NO_PIECE or CUT.
        text: what `spans` point into; empty where nobody asks for it.
        spans: begin and end of each word in `text`.
    """

    tags: tuple[int, ...]
    places: tuple[int, ...] = ()
    text: str = ""
    spans: tuple[tuple[int, int], ...] = ()


def split_text(text: str) -> tuple[list[str], Words]:
    """Return a text's words: letters and digits that stand together, any other character but white space."""
    found = list(_WORD.finditer(text))
    words = Words((0,) * len(found), text=text, spans=tuple(word.span() for word in found))
    return [word[0] for word in found], words


def places_of(encoded: Any, row: int, count: int) -> tuple[int, ...]:
    """Return where the first piece of each of `count` words stands in a row of a fast tokenizer's answer."""
    first: dict[int, int] = {}
    for place, word in enumerate(encoded.word_ids(row)):
        if word is not None:
            first.setdefault(word, place)
    # Of the words past the last one that is in, some may be cut and others nothing to the tokenizer: as soon
    # as one piece was cut, all of these count as cut.
    beyond = max(first, default=-1) if encoded.encodings[row].overflowing else count
    return tuple(first.get(word, CUT if word > beyond else NO_PIECE) for word in range(count))
