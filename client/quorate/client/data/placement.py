"""On which side of a split a row lies: a keyed hash of the row itself, and of nothing else.

So a row lies on the same side alone and among any others, in any order, for ever, and which rows are
measured exactly says nothing of a row that is trained on. A draw over all rows, stratified or not, has
neither: one row more moves others. What that costs is the strata: each label has its share of a split as
coins have it. See docs/decisions/046-a-row-lies-where-its-hash-says.md.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quorate.client.data.mapping import LoadedRow, as_key
from quorate.shared.config.sites_config import SplitConfig
from quorate.shared.config.template import is_missing
from quorate.shared.errors import DataError
from quorate.shared.protocol.messages import Split

KEY_BYTES = 32
_DECIMAL = re.compile(r"-?(0|[1-9][0-9]{0,8})\.[0-9]{1,6}")
_SIDE, _ROW, _GROUP, _KEY = b"quorate.side", b"quorate.row", b"quorate.group", b"quorate.key"


@dataclass(frozen=True)
class Placement:
    """Where rows go under one key.

    Args:
        key: a site's own secret; of simulated sites what follows from a seed.
    """

    key: bytes = field(repr=False)

    @classmethod
    def of_seed(cls, seed: int) -> Placement:
        """Return the placing of simulated sites, whose splits anyone can make again."""
        return cls(hashlib.sha256(f"quorate split {seed}".encode()).digest())

    @property
    def fingerprint(self) -> str:
        """What tells this key from another, and tells nothing of it."""
        return self._hash(_KEY, b"").hex()

    def side(self, unit: bytes, split: SplitConfig) -> Split:
        """Return where a unit lies: validation has the low end of the hashes and the test the high one.

        So shares that grow take from the training rows, and none moves from one of the two to the other.
        """
        place = int.from_bytes(self._hash(_SIDE, unit)[:8]) / 2**64
        if place < split.validation:
            return "validation"
        return "test" if place >= 1 - split.test else "train"

    def units(self, row: LoadedRow, images: Sequence[str]) -> tuple[bytes, ...]:
        """Return the digests by which it is kept who trained on what: the row's, and its group's if any."""
        own = self._hash(_ROW, content(row.raw, images, row.source))
        return (own,) if row.group is None else (own, self._hash(_GROUP, row.group.encode()))

    def _hash(self, of: bytes, what: bytes) -> bytes:
        return hashlib.blake2b(what, key=self.key, person=of, digest_size=32).digest()


def place(
    rows: Sequence[LoadedRow], split: SplitConfig, placing: Placement, images: Sequence[str]
) -> list[Split]:
    """Return the side of each row; a row of a group lies where its group does."""
    return [
        placing.side(
            b"row" + content(row.raw, images, row.source)
            if row.group is None
            else b"group" + row.group.encode(),
            split,
        )
        for row in rows
    ]


def content(values: Mapping[str, Any], images: Sequence[str], source: str) -> bytes:
    """Return what a row is, whatever file it stands in: its images alone where it has some, else all columns.

    An image is the bytes of its file, so another path or label is the same image. Cells are written as text,
    so 7, 7.0, "7" and "7.0" are alike, and columns without a value are left out.

    Args:
        images: the columns that hold images, as absolute paths or bytes.
    Raises: DataError: an image cannot be read.
    """
    shown = [values[name] for name in images if not is_missing(values.get(name))]
    if shown:
        return b"".join(_image(value, source) for value in shown)
    cells = {name: _plain(value) for name, value in values.items() if not is_missing(value)}
    return json.dumps(cells, sort_keys=True, separators=(",", ":")).encode()


def _image(value: Any, source: str) -> bytes:
    if isinstance(value, bytes):
        return hashlib.sha256(value).digest()
    try:
        return hashlib.sha256(Path(str(value)).read_bytes()).digest()
    except OSError as error:
        raise DataError(f"{source}: the image cannot be read: {error.strerror}.") from error
    except ValueError as error:  # of a path: it may be a row's, so it is not quoted
        message = f"{source}: the image cannot be read: what names it is no path; correct it."
        raise DataError(message) from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items() if each is not None}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, str):
        return as_key(float(value)) if _DECIMAL.fullmatch(value) else value
    return as_key(value)
