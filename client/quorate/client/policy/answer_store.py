"""Identity of requests: what was answered once is answered the same, and never trained again.

STATE/answers.db (SQLite, write-ahead log, fsync'ed, mode 0600) holds an answer before it leaves the site. A
kill at any moment leaves it either stored, and then it is the answer for good, or not, and then nobody has
seen it.

  same request again                                the stored answer, byte for byte
  fit of an answered round from another start       refused: conflict
  fit of a round before the newest answered one     refused: outdated, unless it is stored
  a run id under another configuration              refused: other-config
  join, finish                                      answered afresh: they train nothing

An answer that is an error is not stored: the site may be mended and asked again.

What is kept: of each run its sums for a head, the answers of its newest KEEP_ROUNDS trained rounds (a
coordinator that goes on from a checkpoint asks for no older one) and its newest KEEP_EVALUATIONS evaluations,
until the run was not heard of for KEEP_DAYS, or KEEP_RUNS others were since: the arrays of KEEP_RUNS *
(KEEP_ROUNDS + 1) answers are the most that lies here. The run's configuration hash and the hashes of what was
trained are kept for good, so that nothing old is taken for new.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from pathlib import Path

from quorate.client.site.request import Handler, Request, failed
from quorate.shared.errors import OutputError, ProtocolError, RequestRefused
from quorate.shared.protocol.messages import Update

log = logging.getLogger(__name__)

ANSWERS_FILE = "answers.db"
"""In STATE: what was answered."""
STORED = ("statistics", "fit", "evaluate", "alone")
KEEP_ROUNDS = 2
KEEP_EVALUATIONS = 1000
KEEP_DAYS, KEEP_RUNS = 30, 20
_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (run_id TEXT PRIMARY KEY, config_hash TEXT NOT NULL, heard_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS answers (
    run_id TEXT NOT NULL REFERENCES runs, phase TEXT NOT NULL, round INTEGER NOT NULL, split TEXT NOT NULL,
    input_hash TEXT NOT NULL, message BLOB, PRIMARY KEY (run_id, phase, round, split, input_hash)
);
CREATE UNIQUE INDEX IF NOT EXISTS one_fit_per_round ON answers (run_id, round) WHERE phase = 'fit';
"""


class AnswerStore:
    """A handler that remembers.

    Args:
        path: the database; made with mode 0600.
        inner: answers what was not answered before.
    Raises: OutputError: the database cannot be opened.
    """

    def __init__(self, path: Path, inner: Handler) -> None:
        self._path = path
        self._inner = inner
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite's own files take over its mode
            # Made in one thread and used in another, but never in two at a time.
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise OutputError(
                f"{path}: the stored answers cannot be opened ({error}); mend the file's rights, or move it "
                "away: runs under way then train their round again.",
                kind="answers-not-opened",
            ) from error

    def handle(self, request: Request) -> Update:
        try:
            stored = self.stored(request)
            if stored is not None:
                return stored
            update = self._inner.handle(request)
            if request.header.phase in STORED and update.header.error is None:
                self._store(request, update)
            return update
        except sqlite3.Error as error:
            return failed(request, self._unusable(error))
        except Exception as error:  # whatever it is, only its code leaves
            return failed(request, error)

    def stored(self, request: Request) -> Update | None:
        """Return the answer that this very request got; None where it may be worked on.

        Raises: RequestRefused: it may not (outdated, conflict, other-config). ProtocolError: it trains and
            names a split. OutputError: the database cannot be used.
        """
        try:
            self._bind(request)
            return self._stored(request) if request.header.phase in STORED else None
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def close(self) -> None:
        self._db.close()

    def _unusable(self, error: sqlite3.Error) -> OutputError:
        return OutputError(f"{self._path}: {error}; free some space, or mend the file's rights.")

    def _bind(self, request: Request) -> None:
        run_id, config_hash = request.header.run_id, request.header.config_hash
        # One statement, so that the first configuration wins and no kill comes between.
        ((known,),) = self._db.execute(
            "INSERT INTO runs VALUES (?, ?, ?) ON CONFLICT (run_id) DO UPDATE SET heard_at = "
            "excluded.heard_at RETURNING config_hash",
            (run_id, config_hash, time.time()),
        ).fetchall()
        if known != config_hash:
            raise RequestRefused(
                f"run {run_id} began under configuration {known[:12]} and now comes with {config_hash[:12]}; "
                "have the coordinator start a new run for a changed run file.",
                code="other-config",
            )

    def _stored(self, request: Request) -> Update | None:
        run_id, phase, round, split, input_hash = key = _key(request)
        row = self._db.execute(
            "SELECT message FROM answers WHERE (run_id, phase, round, split, input_hash) = (?, ?, ?, ?, ?)",
            key,
        ).fetchone()
        if row is not None and row[0] is not None:
            log.info("run %s, round %d, %s: the stored answer once more", run_id, round, phase)
            return _as_stored(row[0])
        if phase != "fit":
            return None
        if split:
            raise ProtocolError("a request to train names no split.")
        (newest,) = self._db.execute(
            "SELECT max(round) FROM answers WHERE run_id = ? AND phase = 'fit'", (run_id,)
        ).fetchone()
        if newest is not None and round < newest:
            raise RequestRefused(
                f"run {run_id} is at round {newest} here and is asked to train round {round}; a coordinator "
                "goes on from its last checkpoint, so find out what happened there, or start a new run.",
                code="outdated",
            )
        if newest == round:
            raise RequestRefused(
                f"round {round} of run {run_id} was trained from another start than {input_hash[:12]}, and "
                "no round is trained twice; find out what happened at the coordinator, or start a new run.",
                code="conflict",
            )
        return None

    def _store(self, request: Request, update: Update) -> None:
        """Put the answer on disk, and let go of what nobody will ask for again, in one transaction."""
        key = _key(request)
        old = time.time() - KEEP_DAYS * 86400
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?)", (*key, update.encoded))
            self._db.execute(
                "UPDATE answers SET message = NULL WHERE run_id = ? AND phase = 'fit' AND message IS NOT "
                "NULL AND round NOT IN (SELECT round FROM answers WHERE run_id = ? AND phase = 'fit' "
                "ORDER BY round DESC LIMIT ?)",
                (key[0], key[0], KEEP_ROUNDS),
            )
            self._db.execute(
                "DELETE FROM answers WHERE run_id = ? AND phase = 'evaluate' AND rowid NOT IN (SELECT rowid "
                "FROM answers WHERE run_id = ? AND phase = 'evaluate' ORDER BY rowid DESC LIMIT ?)",
                (key[0], key[0], KEEP_EVALUATIONS),
            )
            lately = "SELECT run_id FROM runs WHERE heard_at >= ? ORDER BY heard_at DESC LIMIT ?"
            stale = f"run_id NOT IN ({lately})"
            self._db.execute(f"DELETE FROM answers WHERE phase <> 'fit' AND {stale}", (old, KEEP_RUNS))
            self._db.execute(
                f"UPDATE answers SET message = NULL WHERE phase = 'fit' AND message IS NOT NULL AND {stale}",
                (old, KEEP_RUNS),
            )


def _key(request: Request) -> tuple[str, str, int, str, str]:
    """Return what makes a request this one, beside the configuration that its run id is tied to."""
    header = request.header
    return header.run_id, header.phase, header.round, header.split or "", request.arrays.content_hash


def _as_stored(message: bytes) -> Update:
    update = Update.decode(message)
    update.encoded = message  # written again, safetensors may order its metadata otherwise
    return update
