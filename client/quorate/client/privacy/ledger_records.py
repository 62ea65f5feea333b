"""What the privacy ledger records: reservations and commits, each tied to the row before it by SHA-256.

A row is one JSON object in canonical form (keys sorted, no spaces, UTF-8, floats as Python's `repr` has
them). Its hash is SHA-256 over exactly these bytes, and it holds the hash of the row before it, so one hash
speaks for everything before it. Nobody needs this program to check that: docs/ledger.md has ten lines.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from quorate.shared.config.config_model import ConfigModel, Sha256
from quorate.shared.errors import LedgerError
from quorate.shared.privacy.privacy_event import PrivacyEvent

BEFORE_ALL = "0" * 64
"""What the first row has as the hash of the row before it."""


class RequestKey(ConfigModel):
    """What makes a request to train this one and no other."""

    run_id: str
    config_hash: str
    round: int
    """Round, from 1."""
    input_hash: str
    """Content hash of the arrays that the training starts from."""


class ProtectedData(ConfigModel):
    """Whose presence a budget speaks of: the records, or the groups by one column, of one data set."""

    places: tuple[str, ...] = Field(min_length=1)
    """Where the data lie: as written, and with links followed; or `hub:ID`, `sklearn:NAME`, `package:...`."""
    group: str | None = None
    """Column that says whose row it is, where the unit is a group; None where it is a record."""

    def shares_units_with(self, other: ProtectedData) -> bool:
        """Whether spending on one counts for the other: the same unit, and a place that holds the other's.

        A folder and a file inside it hold the same rows, so they are one data set here.
        """
        return self.group == other.group and any(
            _overlap(one, another) for one in self.places for another in other.places
        )


class _Row(ConfigModel):
    seq: int = Field(ge=1)
    """Number of the row, from 1."""
    prev: Sha256
    """Hash of the row before; zeros for the first."""
    time: str
    """When it was written, by this machine's clock (UTC)."""

    @property
    def canonical(self) -> str:
        """The text that is hashed and stored."""
        return canonical(self.model_dump(mode="json"))

    @property
    def hash(self) -> str:
        return digest(self.canonical)


class Reservation(_Row):
    """Spending, written before the training that it pays for. It counts in full from now on, for good."""

    kind: Literal["reserve"] = "reserve"
    alias: str
    """Data alias that the run named."""
    protects: ProtectedData
    """The data set, and the unit."""
    request: RequestKey
    """What it was reserved for."""
    event: PrivacyEvent
    """What one round does to the data."""


class Commit(_Row):
    """An answer that was about to leave the site."""

    kind: Literal["commit"] = "commit"
    reservation: int = Field(ge=1)
    """Number of the row that reserved what the answer cost."""
    answer: Sha256
    """SHA-256 of the answer, byte for byte as it left."""


Row = Annotated[Reservation | Commit, Field(discriminator="kind")]
_ROW: TypeAdapter[Reservation | Commit] = TypeAdapter(Row)


@dataclass(frozen=True)
class StoredRow:
    """A row as the database has it, believed in nothing."""

    seq: object
    content: object
    hash: object


def canonical(content: object) -> str:
    """Return the one text of a JSON value."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(text: str) -> str:
    """Return the SHA-256 of a text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def now() -> str:
    """Return the time as rows have it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def chained(stored: Iterable[StoredRow]) -> Iterator[Reservation | Commit]:
    """Yield the rows, each one proven to be the next of an unbroken chain.

    Raises: LedgerError: naming the first row that is not what was written.
    """
    prev, open_reservations = BEFORE_ALL, set[int]()
    for number, each in enumerate(stored, start=1):
        row = _parsed(number, each)
        if row.prev != prev:
            raise LedgerError(
                f"row {number} was written after a row with hash {row.prev[:12]}, and the row before it has "
                f"{prev[:12]}: rows were edited, removed or reordered."
            )
        if isinstance(row, Reservation):
            open_reservations.add(number)
        elif row.reservation not in open_reservations:
            raise LedgerError(f"row {number} commits row {row.reservation}, which is no open reservation.")
        else:
            open_reservations.remove(row.reservation)
        prev = row.hash
        yield row


def _parsed(number: int, stored: StoredRow) -> Reservation | Commit:
    content = stored.content
    if stored.seq != number:
        raise LedgerError(f"row {number} is missing or has another number ({stored.seq!r:.40}).")
    if not isinstance(content, str) or digest(content) != stored.hash:
        raise LedgerError(f"row {number} was edited: its content does not have the hash stored with it.")
    try:
        row = _ROW.validate_json(content)
    except ValidationError as error:
        raise LedgerError(f"row {number} is no row of a ledger ({error.error_count()} errors).") from None
    if row.seq != number or row.canonical != content:
        raise LedgerError(f"row {number} was not written by this program: its content is not canonical.")
    return row


def _overlap(one: str, other: str) -> bool:
    if one == other:
        return True
    if not (one.startswith("/") and other.startswith("/")):
        return False
    return PurePath(one).is_relative_to(other) or PurePath(other).is_relative_to(one)
