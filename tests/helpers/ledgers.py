"""Ledgers for tests: where they lie, what they are asked for, and ways to tamper with them."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quorate.client.privacy.ledger import DATABASE, HEADS, Ledger
from quorate.client.privacy.ledger_records import ProtectedData, RequestKey, canonical, digest
from quorate.client.privacy.ledger_verify import Anchor, verify
from quorate.shared.privacy.privacy_event import PrivacyEvent

EVENT = PrivacyEvent(sampling_probability=0.1, noise_multiplier=1.1, steps=3)
NOTES = ProtectedData(places=("/data/notes.csv",))


def key(round: int, run_id: str = "job") -> RequestKey:
    return RequestKey(run_id=run_id, config_hash="c" * 64, round=round, input_hash=f"{round:064x}")


def answer(round: int) -> str:
    return digest(f"answer {round}")


@dataclass(frozen=True)
class Place:
    """A ledger's two places."""

    folder: Path

    def __post_init__(self) -> None:
        (self.folder / "elsewhere").mkdir(parents=True, exist_ok=True)

    @property
    def database(self) -> Path:
        return self.folder / "ledger" / DATABASE

    @property
    def heads(self) -> Path:
        return self.folder / "elsewhere" / HEADS

    def open(self) -> Ledger:
        return Ledger(self.folder / "ledger", self.heads)

    def findings(self, noted: str | None = None) -> tuple[str, ...]:
        return verify(self.database, Anchor(self.heads), noted).findings

    def fill(self, rounds: int, first: int = 1, run_id: str = "job") -> None:
        """Reserve and commit rounds; two rows each."""
        ledger = self.open()
        for round in range(first, first + rounds):
            ledger.commit(ledger.reserve(key(round, run_id), "notes", NOTES, EVENT), answer(round))
        ledger.close()

    def copy(self, to: Path) -> Place:
        shutil.copytree(self.folder, to)
        return Place(to)

    def tamper(self, *statements: tuple[str, tuple[Any, ...]]) -> None:
        """Change rows as somebody with the file's rights can: the triggers are taken away first."""
        with closing(sqlite3.connect(self.database, isolation_level=None)) as db:
            db.execute("PRAGMA synchronous = OFF")
            db.execute("BEGIN")
            for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
                db.execute(f"DROP TRIGGER {name}")
            for statement, values in statements:
                db.execute(statement, values)
            db.execute("COMMIT")

    def rows(self) -> list[tuple[int, dict[str, Any], str]]:
        with closing(sqlite3.connect(self.database)) as db:
            found = db.execute("SELECT seq, content, hash FROM rows ORDER BY seq").fetchall()
        return [(seq, json.loads(content), hash) for seq, content, hash in found]

    def write_anew(self, rows: list[dict[str, Any]]) -> None:
        """Put a chain of other rows in the place of the ledger's, with hashes that are right."""
        prev, statements = "0" * 64, [("DELETE FROM rows", ())]
        for seq, row in enumerate(rows, start=1):
            text = canonical({**row, "seq": seq, "prev": prev})
            prev = digest(text)
            statements.append(("INSERT INTO rows VALUES (?, ?, ?)", (seq, text, prev)))  # type: ignore[arg-type]
        self.tamper(*statements)  # type: ignore[arg-type]
