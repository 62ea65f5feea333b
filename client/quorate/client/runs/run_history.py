"""What was done with this site's data: a line for each run that asked, kept in STATE/runs.db. No torch here.

SQLite with a rollback journal (so that another user may read it without leaving a file), fsync'ed, mode 0600.
What leaves is written down before it leaves; where that cannot be done, nothing leaves. A kill at any moment
costs the line of the message in hand alone, and of its time the last TICK_SECONDS.

Kept are the KEEP runs heard of last that got an answer, and KEEP_REFUSED that got none. The work is kept by
the hour, for the limits of `policy`.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from quorate.shared.errors import OutputError
from quorate.shared.progress import StepEvent

DATABASE = "runs.db"
KEEP, KEEP_REFUSED = 1000, 200
TICK_SECONDS = 5.0
_HOUR, _DAY = 3600, 86400
_BUSY_SECONDS = 30.0
"""How long somebody may be reading before a line cannot be written."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    run_id TEXT PRIMARY KEY, config_hash TEXT NOT NULL, name TEXT NOT NULL, federation TEXT NOT NULL,
    server TEXT NOT NULL, task TEXT NOT NULL, data TEXT NOT NULL, model TEXT, privacy TEXT,
    rounds INTEGER NOT NULL, asked_at REAL NOT NULL, heard_at REAL NOT NULL, begun_at REAL, finished_at REAL,
    round INTEGER NOT NULL DEFAULT 0, trained INTEGER NOT NULL DEFAULT 0, rows INTEGER, claim TEXT,
    answered INTEGER NOT NULL DEFAULT 0, refused INTEGER NOT NULL DEFAULT 0, code TEXT, why TEXT,
    code_at REAL, seconds REAL NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS sent (
    run_id TEXT NOT NULL REFERENCES runs, kind TEXT NOT NULL, messages INTEGER NOT NULL,
    bytes INTEGER NOT NULL, PRIMARY KEY (run_id, kind)
);
CREATE TABLE IF NOT EXISTS work (hour INTEGER PRIMARY KEY, seconds REAL NOT NULL);
CREATE TABLE IF NOT EXISTS in_hand (
    one INTEGER PRIMARY KEY CHECK (one = 1), run_id TEXT NOT NULL, phase TEXT NOT NULL,
    round INTEGER NOT NULL, since REAL NOT NULL, seconds REAL NOT NULL DEFAULT 0, step INTEGER, steps INTEGER
);
"""


@dataclass(frozen=True)
class Asked:
    """A run as it describes itself, and who sends it."""

    run_id: str
    config_hash: str
    name: str
    federation: str
    server: str
    task: str
    data: str
    model: str | None
    privacy: str | None
    rounds: int


@dataclass(frozen=True)
class Left:
    """What a message that was answered let out.

    Args:
        kinds: what -> bytes.
        rows: training rows, where it tells them.
        claim: what was promised of privacy, where it tells that.
    """

    kinds: Mapping[str, int]
    rows: int | None = None
    claim: str | None = None


class RunHistory:
    """The book of one site process.

    Args:
        path: the database; made with mode 0600.
    Raises: OutputError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._started = self._ticked = time.monotonic()
        with self._usable():
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            # Made in one thread and used in another, but never in two at a time.
            self._db = sqlite3.connect(
                path, timeout=_BUSY_SECONDS, check_same_thread=False, isolation_level=None
            )
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(_SCHEMA)

    def settle(self) -> None:
        """Take what a process before this one was killed at out of its hand; the time that it took counts.

        To be called once nobody else answers for this site.
        """
        with self._writing():
            for since, seconds in self._db.execute("SELECT since, seconds FROM in_hand").fetchall():
                self._add_work(since, seconds)
            self._db.execute("DELETE FROM in_hand")

    def close(self) -> None:
        self._db.close()

    def begin(self, asked: Asked, phase: str, round: int) -> None:
        """Note that a message is being worked on. Raises: OutputError, as all that follow."""
        names = [each.name for each in fields(Asked)]
        own = ", ".join(names)
        now, marks = time.time(), ", ".join("?" * len(names))
        # A run that has begun is what it began as: its id under another configuration is refused.
        newest = ", ".join(f"{name} = excluded.{name}" for name in names[1:])
        with self._writing():
            self._db.execute(
                f"INSERT INTO runs ({own}, asked_at, heard_at) VALUES ({marks}, ?, ?) "
                f"ON CONFLICT (run_id) DO UPDATE SET {newest} WHERE begun_at IS NULL",
                (*(getattr(asked, name) for name in names), now, now),
            )
            self._db.execute("UPDATE runs SET heard_at = ? WHERE run_id = ?", (now, asked.run_id))
            self._db.execute(
                "INSERT OR REPLACE INTO in_hand (one, run_id, phase, round, since) VALUES (1, ?, ?, ?, ?)",
                (asked.run_id, phase, round, now),
            )
        self._started = self._ticked = time.monotonic()

    def tick(self, event: StepEvent) -> None:
        """Note how far the message in hand is, now and then."""
        now = time.monotonic()
        if now - self._ticked >= TICK_SECONDS:
            self._ticked = now
            with self._writing():
                self._db.execute(
                    "UPDATE in_hand SET seconds = ?, step = ?, steps = ?",
                    (now - self._started, event.step, event.steps),
                )

    def end(
        self, asked: Asked, phase: str, round: int, left: Left | None, code: str = "", why: str = ""
    ) -> None:
        """Note what came of the message in hand.

        Args:
            left: what it lets out; None where it is refused.
            code: why it is refused, as the coordinator learns it.
            why: the same in words, which stay here.
        """
        now, seconds, run_id = time.time(), time.monotonic() - self._started, asked.run_id
        with self._writing():
            self._add_work(now, seconds)
            self._db.execute("DELETE FROM in_hand")
            self._db.execute(
                "UPDATE runs SET heard_at = ?, seconds = seconds + ? WHERE run_id = ?", (now, seconds, run_id)
            )
            if left is None:
                self._db.execute(
                    "UPDATE runs SET refused = refused + 1, code = ?, why = ?, code_at = ? WHERE run_id = ?",
                    (code, why[:2000], now, run_id),
                )
            else:
                self._note_left(run_id, phase, round, left, now)
            self._let_go(now)

    def has_begun(self, run_id: str) -> bool:
        """Whether anything of this run was answered."""
        return bool(self._count("SELECT count(*) FROM runs WHERE run_id = ? AND begun_at > 0", run_id))

    def begun_since(self, moment: float) -> int:
        """Return how many runs have begun since (POSIX time)."""
        return int(self._count("SELECT count(*) FROM runs WHERE begun_at > ?", moment))

    def seconds_since(self, moment: float) -> float:
        """Return how long was worked in the hours since (POSIX time) [s]."""
        return self._count("SELECT coalesce(sum(seconds), 0) FROM work WHERE hour >= ?", int(moment // _HOUR))

    def _count(self, query: str, value: str | float) -> float:
        with self._usable():
            ((found,),) = self._db.execute(query, (value,)).fetchall()
            return float(found)

    def _note_left(self, run_id: str, phase: str, round: int, left: Left, now: float) -> None:
        trained = phase == "fit"
        self._db.execute(
            "UPDATE runs SET answered = answered + 1, begun_at = coalesce(begun_at, ?), "
            "trained = trained + (? AND ? > round), round = max(round, ?), rows = coalesce(?, rows), "
            "claim = coalesce(?, claim), finished_at = CASE WHEN ? THEN ? ELSE finished_at END "
            "WHERE run_id = ?",
            (
                *(now, trained, round, round if trained else 0),
                *(left.rows, left.claim, phase == "finish", now, run_id),
            ),
        )
        self._db.executemany(
            "INSERT INTO sent VALUES (?, ?, 1, ?) ON CONFLICT (run_id, kind) DO UPDATE SET "
            "messages = messages + 1, bytes = bytes + excluded.bytes",
            [(run_id, kind, size) for kind, size in left.kinds.items()],
        )

    def _add_work(self, at: float, seconds: float) -> None:
        self._db.execute(
            "INSERT INTO work VALUES (?, ?) ON CONFLICT (hour) DO UPDATE SET seconds = seconds + "
            "excluded.seconds",
            (int(at // _HOUR), seconds),
        )

    def _let_go(self, now: float) -> None:
        """Forget the oldest; what limits by the day count is never among them."""
        old = (
            "SELECT run_id FROM runs WHERE begun_at IS NOT NULL AND begun_at < ? AND run_id NOT IN "
            "(SELECT run_id FROM runs WHERE begun_at IS NOT NULL ORDER BY heard_at DESC LIMIT ?) "
            "UNION SELECT * FROM (SELECT run_id FROM runs WHERE begun_at IS NULL ORDER BY heard_at DESC "
            "LIMIT -1 OFFSET ?)"
        )
        for table in ("sent", "runs"):  # by the same list: `runs` is emptied last
            self._db.execute(
                f"DELETE FROM {table} WHERE run_id IN ({old})", (now - 2 * _DAY, KEEP, KEEP_REFUSED)
            )
        self._db.execute("DELETE FROM work WHERE hour < ?", (int((now - 2 * _DAY) // _HOUR),))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._usable(), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise OutputError(
                f"{self._path}: what is done with the data cannot be written down ({error}), so nothing is; "
                "free some space, mend the file's rights, or move it away: limits by the day then begin anew."
            ) from error
