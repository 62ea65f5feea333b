"""How a site's rows are placed, and which of them were trained on under privacy: STATE/splits.

    key          32 random bytes, mode 0600, made when rows are first asked for: the secret of the placing
    trained.db   digests of the rows and groups that a private run was trained on, under that key (SQLite)
    anew         made by a person, and taken away when it was heeded: begin without what was lost

Rows lie where they lie for ever as long as the key stays. A site may still change shares, move rows from one
file to another, or say otherwise whose row is whose; so what a private run is to be trained on is written
down before it is, on disk, and is never measured again, in any run.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from quorate.client.data.mapping import LoadedRow
from quorate.client.data.placement import KEY_BYTES, Placement
from quorate.client.node.folder import CONNECTION_YAML, SiteFolder
from quorate.client.privacy.ledger import DATABASE as LEDGER
from quorate.client.privacy.ledger_verify import stored_rows
from quorate.shared.errors import LedgerError, OutputError
from quorate.shared.process.files import make_folder, sync, write_atomically
from quorate.shared.protocol.messages import Split

log = logging.getLogger(__name__)

FOLDER, KEY, TRAINED, ANEW = "splits", "key", "trained.db", "anew"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS key (fingerprint TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS trained (unit BLOB PRIMARY KEY) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS anew (begun_at REAL NOT NULL) STRICT;
"""


@dataclass(frozen=True)
class SiteSplits:
    """The placing of one site, and its book of what was trained on.

    Args:
        book: path of the database; it may not be there before something was trained on.
    """

    placing: Placement
    book: Path

    def leave_out_trained(
        self, splits: Mapping[Split, Sequence[LoadedRow]], images: Sequence[str]
    ) -> tuple[dict[Split, list[LoadedRow]], int]:
        """Return the splits without measured rows that were trained on under privacy, and how many these are.

        Raises: OutputError: the book cannot be read.
        """
        kept = {name: list(rows) for name, rows in splits.items()}
        if not self.book.exists():
            return kept, 0
        left = 0
        with _open(self.book, "ro") as db:
            for name in kept.keys() - {"train"}:
                rows = [row for row in kept[name] if not _known(db, self.placing.units(row, images))]
                left += len(kept[name]) - len(rows)
                kept[name] = rows
        return kept, left

    def knows_none(self, splits: Mapping[Split, Sequence[LoadedRow]], images: Sequence[str]) -> bool:
        """Tell whether private runs were trained here, and on none of these rows.

        Raises: OutputError: the book cannot be read.
        """
        if not self.book.exists():
            return False
        with _open(self.book, "ro") as db:
            if not db.execute("SELECT 1 FROM trained LIMIT 1").fetchone():
                return False
            rows = (row for each in splits.values() for row in each)
            return not any(_known(db, self.placing.units(row, images)) for row in rows)

    def write_down(self, units: Iterable[bytes]) -> None:
        """Keep what is about to be trained on; it is on disk when this returns.

        Raises: OutputError: it could not be written; nothing may be trained on then.
        """
        with _open(self.book, "rwc") as db, db:
            db.executemany("INSERT OR IGNORE INTO trained VALUES (?)", ((unit,) for unit in units))


def open_splits(site: SiteFolder) -> SiteSplits:
    """Return how the rows of a site are placed; for the site's process, whose key it makes where it is new.

    Raises: LedgerError: the key or the book is gone, or of another one, and no person had it begin anew.
        OutputError: they cannot be read or written.
    """
    folder = site.state / FOLDER
    path, book, anew = folder / KEY, folder / TRAINED, folder / ANEW
    if not path.exists():
        if book.exists() or (_has_spent(site) and not anew.exists()):
            raise _lost(path, "says what is trained on and what is measured")
        make_folder(folder)
        write_atomically(path, os.urandom(KEY_BYTES))
    placing = read_placing(path)
    with _open(book, "rwc") as db:
        db.executescript(_SCHEMA)
        # A kill may have come before the first line; nothing was trained on then.
        with db:
            db.execute(
                "INSERT INTO key SELECT ? WHERE NOT EXISTS (SELECT 1 FROM key UNION SELECT 1 FROM trained)",
                (placing.fingerprint,),
            )
            if anew.exists():
                db.execute("INSERT INTO anew VALUES (?)", (time.time(),))
        made, empty = db.execute("SELECT fingerprint FROM key").fetchall(), _is_empty(db)
    sync(folder)
    if made != [(placing.fingerprint,)]:
        raise LedgerError(
            f"{path} is not the key that {book.name} beside it was written with; put both back from one "
            "backup of the state folder.",
            kind="another-key",
        )
    if empty and _has_spent(site):
        raise _lost(book, "says what was trained on")
    anew.unlink(missing_ok=True)
    return SiteSplits(placing, book)


def _lost(path: Path, what: str) -> LedgerError:
    return LedgerError(
        f"{path} is gone or empty, which {what}, and private runs were trained here: without it rows "
        "of theirs could be measured. Put it back from a backup of the state folder; docs/data.md "
        "(Splits) says what to do without one.",
        kind="key-or-book-gone",
    )


def look_at_splits(site: SiteFolder) -> SiteSplits | None:
    """Return how the rows of a site are placed, where its process has made a key; changes nothing.

    Raises: LedgerError: it is no key; what was trained on is gone. OutputError: they cannot be read.
    """
    folder = site.state / FOLDER
    if not (folder / KEY).exists():
        log.warning(
            "%s has not read any rows yet and so has no key to place them by; splits shown here follow from "
            "the seed, and the site's own will be others of about these sizes",
            site.path,
        )
        return None
    placing, book = read_placing(folder / KEY), folder / TRAINED
    if not (folder / ANEW).exists() and _has_spent(site) and not _holds_rows(book):
        raise _lost(book, "says what was trained on")
    return SiteSplits(placing, book)


def look_beside(base_dir: Path) -> SiteSplits | None:
    """As `look_at_splits`, for the folder of a site.yaml; None where no start-up kit was unpacked to it."""
    here = SiteFolder.find(base_dir) if (base_dir / CONNECTION_YAML).is_file() else None
    return None if here is None else look_at_splits(here)


def read_placing(path: Path) -> Placement:
    """Read a key.

    Raises: LedgerError: it is not one. OutputError: it cannot be read.
    """
    try:
        key = path.read_bytes()
    except OSError as error:
        raise OutputError(
            f"{path} cannot be read: {error.strerror}; give this command as the user of the site process."
        ) from error
    if len(key) != KEY_BYTES:
        raise LedgerError(
            f"{path} holds {len(key)} bytes and not the {KEY_BYTES} of a key; put it back from a backup.",
            kind="no-key",
        )
    return Placement(key)


def _has_spent(site: SiteFolder) -> bool:
    path = site.ledger / LEDGER
    if not path.exists():
        return False
    with _open(path, "ro") as db:
        return bool(stored_rows(db))


def _holds_rows(book: Path) -> bool:
    if not book.exists():
        return False
    with _open(book, "ro") as db:
        return not _is_empty(db)


def _is_empty(db: sqlite3.Connection) -> bool:
    # Rows are written down before anything is spent on them, so a book without any is not the one.
    return not db.execute("SELECT 1 FROM trained UNION ALL SELECT 1 FROM anew LIMIT 1").fetchone()


def _known(db: sqlite3.Connection, units: Iterable[bytes]) -> bool:
    return any(db.execute("SELECT 1 FROM trained WHERE unit = ?", (unit,)).fetchone() for unit in units)


@contextmanager
def _open(path: Path, mode: str) -> Iterator[sqlite3.Connection]:
    try:
        if mode == "rwc":
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite's own files take over its mode
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True)) as db:
            db.execute("PRAGMA synchronous = FULL")
            yield db
    except (OSError, sqlite3.Error) as error:
        raise OutputError(
            f"{path} cannot be read or written ({error}); free some space, or mend the file's rights. "
            "Without it nobody knows what was trained on, so no row is used."
        ) from error
