"""The runs of a site, now and past, as its people see them: `quorate site runs`. No torch here."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
import time
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from quorate.client.node.folder import SiteFolder
from quorate.client.policy.approvals import (
    Approval,
    Withdrawal,
    approval,
    waiting_runs,
    withdrawal,
    withdrawn_runs,
)
from quorate.client.runs.run_history import DATABASE
from quorate.shared.config.config_model import ConfigModel
from quorate.shared.errors import OutputError
from quorate.shared.process.files import holder

SILENT_SECONDS = 3600.0
"""A run that has not ended and was not heard of for so long is shown as silent."""
State = Literal["working", "open", "silent", "finished", "refused", "waiting", "withdrawn"]


class InHand(ConfigModel):
    """What the site works on for a run at the moment."""

    phase: str
    """As the coordinator asked: join, start, statistics, fit, evaluate, alone, finish."""
    round: int
    since: datetime
    """When it came (UTC)."""
    step: int | None
    """Optimiser steps done, as of the last few seconds; None before the first word of it."""
    steps: int | None
    """Optimiser steps of the round."""


class Refusal(ConfigModel):
    """The newest message of a run that was refused, or failed."""

    code: str
    """What the coordinator was told."""
    why: str
    """Rule, value and remedy, as in the site's log; this stays here."""
    at: datetime
    """When (UTC)."""


class RunAtSite(ConfigModel):
    """One run, as far as this site knows it."""

    run_id: str
    """Its id, for `quorate site approve` and `withdraw`."""
    name: str
    state: State
    """`working` on a message now; `open`: it may ask again; `silent`: open, and not heard of for an hour;
    `finished`: its result was delivered; `refused`: nothing of it was ever answered; `waiting` for a person;
    `withdrawn` by a person."""
    federation: str
    """Whose coordinator asks."""
    server: str
    """Where the requests come from, HOST:PORT."""
    task: str
    data: str
    model: str | None
    """SHA-256 of the base model."""
    privacy: str | None
    """Unit of privacy and who adds the noise; None: no noise."""
    claim: str | None
    """What this site said of privacy when it joined."""
    rounds: int
    round: int
    """The newest round that was trained here."""
    trained: int
    """Rounds that were trained here."""
    rows: int | None
    started: datetime
    """When it asked first (UTC)."""
    heard: datetime
    """When it was heard of last (UTC)."""
    finished: datetime | None
    """When its result was delivered (UTC)."""
    seconds: float
    """How long this site worked for it [s]."""
    answered: int
    """Messages that were answered."""
    left: dict[str, int]
    """What left in them: kind -> bytes (quorate.client.runs.message_log.what_left)."""
    refused: int
    """Messages that were refused or failed."""
    refusal: Refusal | None
    """The newest of them."""
    approval: Approval | None
    """Who approved it here."""
    withdrawal: Withdrawal | None
    """Who took this site out of it."""
    in_hand: InHand | None


def runs_of(site: SiteFolder) -> list[RunAtSite]:
    """Return the runs that asked here, the one heard of last first.

    Raises: OutputError: the book of runs cannot be read.
    """
    path = site.state / DATABASE
    try:
        if not path.is_file():  # no run has asked yet
            return []
        runs, sent, in_hand = _read(path)
        alive = holder(site.socket.with_suffix(".lock")) is not None
        waiting, withdrawn = set(waiting_runs(site.state)), set(withdrawn_runs(site.state))
    except (OSError, sqlite3.Error) as error:
        raise OutputError(
            f"{path}: cannot be read ({error}); give the command as the site process's user, or as root."
        ) from error
    found = []
    for row in runs:
        run_id = row["run_id"]
        now = in_hand if alive and in_hand is not None and in_hand["run_id"] == run_id else None
        found.append(
            RunAtSite.model_validate(
                {
                    **{name: row[name] for name in RunAtSite.model_fields if name in row},
                    "state": _state(row, now is not None, run_id in waiting, run_id in withdrawn),
                    "started": _utc(row["asked_at"]),
                    "heard": _utc(row["heard_at"]),
                    "finished": _utc(row["finished_at"]),
                    "left": {each["kind"]: each["bytes"] for each in sent if each["run_id"] == run_id},
                    "refusal": _refusal(row),
                    "approval": _approval(site.state, run_id),
                    "withdrawal": withdrawal(site.state, run_id),
                    "in_hand": now
                    and InHand(
                        phase=now["phase"],
                        round=now["round"],
                        since=datetime.fromtimestamp(now["since"], UTC),
                        step=now["step"],
                        steps=now["steps"],
                    ),
                }
            )
        )
    return found


def _state(row: dict[str, Any], working: bool, waiting: bool, withdrawn: bool) -> State:
    if withdrawn:
        return "withdrawn"
    if working:
        return "working"
    if row["finished_at"] is not None:
        return "finished"
    if waiting:
        return "waiting"
    if row["begun_at"] is None:
        return "refused"
    return "silent" if time.time() - row["heard_at"] > SILENT_SECONDS else "open"


def _refusal(row: dict[str, Any]) -> Refusal | None:
    if row["code"] is None:
        return None
    return Refusal(code=row["code"], why=row["why"], at=datetime.fromtimestamp(row["code_at"], UTC))


def _approval(state: Path, run_id: str) -> Approval | None:
    taken_back = withdrawal(state, run_id)
    return approval(state, run_id) or (taken_back.approval if taken_back else None)


def _utc(moment: float | None) -> datetime | None:
    return None if moment is None else datetime.fromtimestamp(moment, UTC)


def _read(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any] | None]:
    """Return runs, what they were sent, and what is in hand; nothing is changed on disk.

    A process that was killed while it wrote leaves a journal that only a writer can roll back: then a copy is
    read.
    """
    try:
        return _tables(path)
    except sqlite3.OperationalError:
        if not path.with_name(f"{path.name}-journal").exists():
            raise
    with tempfile.TemporaryDirectory(prefix="quorate-") as folder:
        copy = Path(folder) / path.name
        for suffix in ("", "-journal"):
            if (source := path.with_name(path.name + suffix)).exists():
                shutil.copyfile(source, copy.with_name(copy.name + suffix))
        return _tables(copy, mode="rw")


def _tables(
    path: Path, mode: str = "ro"
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any] | None]:
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True)) as db:
        db.row_factory = sqlite3.Row
        db.execute("BEGIN")
        runs, sent, in_hand = (
            [dict(row) for row in db.execute(f"SELECT * FROM {table}")]
            for table in ("runs ORDER BY heard_at DESC", "sent", "in_hand")
        )
    return runs, sent, in_hand[0] if in_hand else None
