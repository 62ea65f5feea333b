"""Checks a privacy ledger against itself, and against the heads that were noted outside of its database.

`ledger.head`, the anchor, is a text file in another place than the database, to which one line is added for
each row, after the row is on disk and before what it stands for happens:

    ROW HASH TIME                 number, hash and time of the row; line 0 stands before all rows

So at any moment, and after a crash at any moment, the anchor lacks at most the newest row, and that row has
had no effect yet. A database that lacks a row of the anchor, or has another one there, was cut short, put
back from a copy, or written anew.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from quorate.client.privacy.ledger_records import BEFORE_ALL, Commit, Reservation, StoredRow, chained, now
from quorate.shared.errors import LedgerError
from quorate.shared.process.files import write_atomically, writing

# Of one length from the hash on, so that no part of a line is a line.
_LINE = re.compile(r"(0|[1-9][0-9]*) ([0-9a-f]{64}) [0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}\+00:00")


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Args:
        stored: the rows as the database has them.
        rows: those that are proven, from the first.
        findings: what is wrong, one sentence each; empty where all is well.
    """

    stored: tuple[StoredRow, ...]
    rows: tuple[Reservation | Commit, ...]
    findings: tuple[str, ...]

    @property
    def head(self) -> str:
        """Hash of the last proven row, which speaks for all before it."""
        return self.rows[-1].hash if self.rows else BEFORE_ALL


@dataclass(frozen=True)
class Heads:
    """What an anchor holds.

    Args:
        hashes: of row 0 (zeros), 1, 2, ...
        cut_short: lines after the last whole one, which a crash ended in the middle.
    """

    hashes: tuple[str, ...]
    cut_short: tuple[str, ...] = ()

    @property
    def newest(self) -> int:
        """Number of the newest row that is anchored; -1 where there is no anchor."""
        return len(self.hashes) - 1


class Anchor:
    """The file that heads are appended to.

    Args:
        path: of `ledger.head`; its folder must be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self) -> None:
        """Make the file, with the line that stands before all rows.

        Raises: OutputError: its folder is missing or cannot be written.
        """
        write_atomically(self.path, f"0 {BEFORE_ALL} {now()}\n".encode())

    def read(self) -> Heads:
        """Return the anchored heads; none where the file is missing.

        Raises: LedgerError: it holds something else. OutputError: it cannot be read.
        """
        with writing(self.path):
            if not self.path.exists():
                return Heads(())
            *lines, last = self.path.read_bytes().decode("ascii", errors="replace").split("\n")
        hashes: list[str] = []
        parts: list[str] = []
        for number, line in enumerate(lines, start=1):
            whole = _LINE.fullmatch(line)
            if number > 1 and line == lines[number - 2]:
                continue  # all of it was there but its end
            if whole is None or int(whole[1]) != len(hashes):
                parts.append(line)
            elif all(map(line.startswith, map(_written, parts))):
                hashes.append(whole[2])
                parts.clear()
            else:
                raise LedgerError(f"{self.path}: line {number - 1} is no line of an anchor; it was edited.")
        return Heads(tuple(hashes), tuple(part for part in (*parts, last) if _written(part)))

    def append(self, rows: Sequence[Reservation | Commit]) -> None:
        """Note rows; they are on disk (fsync) when this returns.

        Raises: OutputError: the disk is full, or the file was taken away.
        """
        with writing(self.path):
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND)  # a file that is gone is no new anchor
            try:
                size = os.fstat(descriptor).st_size
                ends = os.pread(descriptor, 1, size - 1) == b"\n" if size else True
                text = "".join(f"{anchor_line(row)}\n" for row in rows)
                data = ("" if ends else "\n").encode() + text.encode()
                while data:
                    data = data[os.write(descriptor, data) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def anchor_line(row: Reservation | Commit) -> str:
    """Return the line of a row: the same one whenever it is written, so a part of it can be recognised."""
    return f"{row.seq} {row.hash} {row.time}"


def verify(database: Path, anchor: Anchor, noted: str | None = None) -> Verdict:
    """Check a ledger that may be in use meanwhile. Changes nothing.

    Args:
        noted: a head that somebody wrote down, or the beginning of it; it must be one of the chain.
    Raises: OutputError: something cannot be read.
    """
    # In this order, the rows between the two readings of the anchor explain all that a writer does meanwhile.
    findings: list[str] = []
    before = _heads(anchor, findings)
    stored = _stored(database, findings)
    after = _heads(anchor, []) if before is not None else None
    rows: list[Reservation | Commit] = []
    try:
        rows.extend(chained(stored))  # what is proven before an error stays in it
    except LedgerError as error:
        findings.append(f"{database}: {error}")
    if before is not None and after is not None:
        findings += against_heads(len(stored), rows, before, after, anchor.path)
    if noted is not None and not any(row.hash.startswith(noted.lower()) for row in rows):
        findings.append(f"{database}: no row has the hash {noted}, which was noted as a head of this ledger.")
    return Verdict(tuple(stored), tuple(rows), tuple(findings))


def against_heads(
    count: int, rows: Sequence[Reservation | Commit], before: Heads, after: Heads, anchor: Path
) -> list[str]:
    """Hold rows against heads that were anchored before and after they were read.

    Args:
        count: rows in the database.
        rows: those of them that are proven, from the first.
        before: the anchor just before they were read.
        after: and just after.
    Returns: what is wrong.
    """
    if after.newest < 0:
        return [f"{anchor}: is missing, and the database has {count} rows."] if count else []
    found = []
    if count < before.newest:
        found.append(
            f"rows {count + 1} to {before.newest} are missing: {anchor} has their heads, so the end of the "
            "database was removed, or an older copy was put in its place."
        )
    if count > after.newest + 1:
        found.append(f"{anchor} ends at row {after.newest} and the database at row {count}: its end is gone.")
    for row, head in zip(rows, after.hashes[1:], strict=False):
        if row.hash != head:
            found.append(f"row {row.seq} is not the one that {anchor} has: the ledger was written anew.")
            break
    if len(rows) > after.newest and not all(
        anchor_line(rows[after.newest]).startswith(_written(part)) for part in after.cut_short
    ):
        found.append(f"{anchor}: what stands after line {after.newest} is no line of an anchor.")
    return found


def stored_rows(db: sqlite3.Connection) -> list[StoredRow]:
    """Return the rows as they are stored, in order; none where the table was not made yet."""
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'rows'").fetchone() is None:
        return []
    return [StoredRow(*row) for row in db.execute("SELECT seq, content, hash FROM rows ORDER BY seq")]


def _heads(anchor: Anchor, findings: list[str]) -> Heads | None:
    try:
        return anchor.read()
    except LedgerError as error:
        findings.append(str(error))
        return None


def _stored(database: Path, findings: list[str]) -> list[StoredRow]:
    if not database.exists():
        return []
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as db:
            return stored_rows(db)
    except sqlite3.Error as error:
        findings.append(f"{database}: cannot be read as a database ({error}).")
        return []


def _written(part: str) -> str:
    """Return what a line that was cut short holds; some file systems fill the rest of it with zeros."""
    return part.rstrip("\0")
