"""The privacy ledger: what this site's data have spent, on disk before anything that they paid for leaves.

STATE/ledger/ledger.db (SQLite, write-ahead log, fsync'ed, mode 0600) has one row per step:

    reserve   before the training; from here on it counts in full, whatever happens
    commit    the answer is stored and about to leave; a row of its own that names the reservation

Rows are only ever added: triggers refuse everything else, and each row holds the hash of the one before
(`quorate.client.privacy.ledger_records`). The newest hash is also appended to a file elsewhere
(`quorate.client.privacy.ledger_verify`). The order is database, anchor, effect; a crash between them leaves a
row that counts and an anchor that lacks at most this row, which the next start adds.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from quorate.client.node.folder import SiteFolder
from quorate.client.privacy.ledger_records import (
    BEFORE_ALL,
    Commit,
    ProtectedData,
    RequestKey,
    Reservation,
    chained,
    now,
)
from quorate.client.privacy.ledger_verify import Anchor, Verdict, against_heads, stored_rows, verify
from quorate.shared.errors import ConfigError, LedgerError, OutputError
from quorate.shared.privacy.privacy_event import PrivacyEvent
from quorate.shared.process.files import locked, make_folder, sync

log = logging.getLogger(__name__)

DATABASE, HEADS = "ledger.db", "ledger.head"
"""Names of the database and of the file of heads."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (seq INTEGER PRIMARY KEY, content TEXT NOT NULL, hash TEXT NOT NULL) STRICT;
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON rows
    BEGIN SELECT RAISE(ABORT, 'rows of the ledger are never changed'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON rows
    BEGIN SELECT RAISE(ABORT, 'rows of the ledger are never removed'); END;
CREATE TRIGGER IF NOT EXISTS next_alone BEFORE INSERT ON rows
    WHEN NEW.seq <> (SELECT coalesce(max(seq), 0) + 1 FROM rows)
    BEGIN SELECT RAISE(ABORT, 'rows of the ledger are added at its end alone'); END;
"""


class Ledger:
    """The ledger of one site; one process at a time has it open.

    Args:
        folder: of the database; made with mode 0700 where it is missing.
        heads: the file outside of it that heads are appended to; its folder must be there.
    Raises: LedgerError: it is not what was written, see `verify`. OutputError: it cannot be opened, or
        another process has it.
    """

    def __init__(self, folder: Path, heads: Path) -> None:
        self.path = folder / DATABASE
        self._anchor = Anchor(heads)
        self._rows: list[Reservation | Commit] = []
        self._stale = True
        make_folder(folder)
        with ExitStack() as held:
            held.enter_context(
                locked(folder, f"{folder}: another process has the privacy ledger; stop that one first.")
            )
            check(verify(self.path, self._anchor).findings)
            if self._anchor.read().newest < 0:  # and so there are no rows
                self._anchor.begin()
            with self._touching():
                made = not self.path.exists()
                # SQLite's own files take over its mode.
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
                if made:
                    sync(folder)
                # Made in one thread and used in another, but never in two at a time.
                self._db = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
                held.callback(self._db.close)
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = FULL")
                self._db.executescript(_SCHEMA)
            self._settle()
            self._held = held.pop_all()
        log.info("privacy ledger %s: %d rows, head %s", self.path, len(self._rows), self.head)

    def close(self) -> None:
        """Close the database, and let other processes have it."""
        self._held.close()

    @property
    def rows(self) -> tuple[Reservation | Commit, ...]:
        return tuple(self._rows)

    @property
    def head(self) -> str:
        return self._rows[-1].hash if self._rows else BEFORE_ALL

    @property
    def reservations(self) -> list[Reservation]:
        """What was spent: every reservation, committed or not."""
        return reservations(self._rows)

    def answers(self, key: RequestKey) -> set[str]:
        """Return the hashes of the answers to a request that are committed."""
        asked = {row.seq for row in self.reservations if row.request == key}
        return {row.answer for row in self._rows if isinstance(row, Commit) and row.reservation in asked}

    def uncommitted(
        self, key: RequestKey, protects: ProtectedData | None = None, event: PrivacyEvent | None = None
    ) -> int | None:
        """Return the newest reservation for a request of which nothing has left; None where there is none.

        Args:
            key: of the request.
            protects: the data that it must be for; any when left out.
            event: what it must pay for; anything when left out.
        """
        committed = {row.reservation for row in self._rows if isinstance(row, Commit)}
        found = [
            row.seq
            for row in self.reservations
            if row.request == key
            and row.seq not in committed
            and protects in (None, row.protects)
            and event in (None, row.event)
        ]
        return max(found, default=None)

    def reserve(self, key: RequestKey, alias: str, protects: ProtectedData, event: PrivacyEvent) -> int:
        """Write down what an answer will cost, before it is made.

        A reservation of the very same request, data and event of which nothing has left is used again.

        Returns: the number of the reservation, which is on disk and anchored.
        Raises: OutputError: it could not be written; nothing may be done for the request then.
        """
        self._settle()
        there = self.uncommitted(key, protects, event)
        if there is not None:
            return there
        seq = len(self._rows) + 1
        row = Reservation(
            seq=seq, prev=self.head, time=now(), alias=alias, protects=protects, request=key, event=event
        )
        self._append(row)
        return seq

    def commit(self, reservation: int, answer: str) -> None:
        """Write down that an answer is about to leave.

        Args:
            reservation: what it cost.
            answer: SHA-256 of its bytes.
        Raises: OutputError: it could not be written; the answer must not leave then.
        """
        self._settle()
        row = Commit(
            seq=len(self._rows) + 1, prev=self.head, time=now(), reservation=reservation, answer=answer
        )
        self._append(row)
        log.info("privacy ledger: row %d, head %s", row.seq, row.hash)

    def _append(self, row: Reservation | Commit) -> None:
        self._stale = True  # until it is known what is on disk
        with self._touching():
            self._db.execute("INSERT INTO rows VALUES (?, ?, ?)", (row.seq, row.canonical, row.hash))
        self._rows.append(row)
        self._anchor.append([row])
        self._stale = False

    def _settle(self) -> None:
        """Have memory, database and anchor agree, after a start or a write that failed half way."""
        if not self._stale:
            return
        with self._touching():
            stored = stored_rows(self._db)
        rows, heads = list(chained(stored)), self._anchor.read()
        check(against_heads(len(stored), rows, heads, heads, self._anchor.path))
        if missing := rows[heads.newest :]:
            self._anchor.append(missing)
        self._rows, self._stale = rows, False

    @contextmanager
    def _touching(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise OutputError(
                f"{self.path}: the privacy ledger cannot be read or written ({error}); free some space, or "
                "mend the file's rights. Nothing that costs privacy leaves this site until then."
            ) from error


def open_ledger(site: SiteFolder) -> Ledger:
    """Open a site's ledger, where its folder and site.yaml say.

    Raises: as `check_anchor` and `Ledger`.
    """
    check_anchor(site)
    if site.default_anchor:
        make_folder(site.anchor)
    return Ledger(site.ledger, site.anchor / HEADS)


def verify_of(site: SiteFolder, noted: str | None = None) -> Verdict:
    """Check a site's ledger, where its folder and site.yaml say; it may be in use."""
    return verify(site.ledger / DATABASE, Anchor(site.anchor / HEADS), noted)


def check_anchor(site: SiteFolder) -> None:
    """Raise ConfigError where the folder for heads is part of STATE, or was chosen and is not there."""
    anchor = site.anchor
    if anchor.resolve().is_relative_to(site.state.resolve()):
        raise ConfigError(
            f"site.yaml, anchor: {anchor} is inside {site.state}, so whatever puts back an older ledger puts "
            "back its heads too; name a folder elsewhere."
        )
    if not site.default_anchor and not anchor.is_dir():
        message = f"site.yaml, anchor: there is no folder {anchor}; mount it, or make it for the site's user."
        raise ConfigError(message)


def reservations(rows: Iterable[Reservation | Commit]) -> list[Reservation]:
    """Return the rows that spend."""
    return [row for row in rows if isinstance(row, Reservation)]


def check(findings: Iterable[str]) -> None:
    """Raise LedgerError where a check has found something."""
    if said := " ".join(findings):
        raise LedgerError(
            f"the privacy ledger is not what was written: {said} No run with privacy is answered "
            "until people have found out why; docs/ledger.md says what to do.",
            kind="ledger-not-as-written",
        )
