"""Runs that wait for a person's word, have it, or had it: `quorate site approve|withdraw`. No torch here.

STATE/waiting/RUN_ID.json   configuration of a run that asked and was turned away
STATE/approved/RUN_ID       hash of the configuration that a person approved, who that was, and when
STATE/withdrawn/RUN_ID      a run that this site takes no more part in, by whom and when, who had approved it

The word holds for one configuration. What waits under an id never changes: else a coordinator could put
another configuration in the place of the one that a person has just read.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import re
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from quorate.shared.config.config_model import ConfigModel
from quorate.shared.errors import ConfigError, RequestRefused
from quorate.shared.process.files import write_atomically, writing

RUN_ID = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
"""A run's id, which is a file's name here."""
_WAITING, _APPROVED, _WITHDRAWN = "waiting", "approved", "withdrawn"
_MOST_WAITING = 100
"""Nobody reads more; the oldest that were decided on go, and further runs wait for room."""


class Word(ConfigModel):
    """What a person said of a run."""

    by: str
    """The user of the operating system who gave the command."""
    at: datetime
    """When (UTC)."""


class Approval(Word):
    """A person's yes."""

    config_hash: str
    """Of the configuration that it holds for."""


class Withdrawal(Word):
    """A person's no."""

    approval: Approval | None = None
    """The yes that it took back."""


def approve(state: Path, run_id: str) -> Path:
    """Approve the run that waits under `run_id`, as it asked.

    Args:
        run_id: as the site's log and `quorate runs list` show it.
    Returns: the configuration (JSON) that is approved now, for the person to read.
    Raises: ConfigError: no such run has asked here. OutputError: the folder cannot be written.
    """
    waiting = state / _WAITING / f"{run_id}.json"
    if not re.fullmatch(RUN_ID, run_id) or not waiting.is_file():
        known = ", ".join(waiting_runs(state)) or "none"
        raise ConfigError(
            f"no run {run_id!r} has asked here (waiting: {known}); have the coordinator start it, which then "
            "waits for your word.",
            kind="run-not-waiting",
        )
    digest = hashlib.sha256(waiting.read_bytes()).hexdigest()
    word = Approval(by=_user(), at=datetime.now(UTC), config_hash=digest)
    _write(state, _APPROVED, run_id, word.model_dump_json().encode())
    (state / _WITHDRAWN / run_id).unlink(missing_ok=True)
    return waiting


def withdraw(state: Path, run_id: str) -> None:
    """Take this site out of a run, also in the middle of it: from now on nothing of it is answered.

    What the site sent before stays with the coordinator.

    Args:
        run_id: as the site's log and `quorate runs list` show it.
    Raises: ConfigError: that is no run id. OutputError: the folder cannot be written.
    """
    if not re.fullmatch(RUN_ID, run_id):
        message = f"{run_id!r} is no run id; take it from this site's log or `quorate runs list`."
        raise ConfigError(message, kind="no-run-id")
    before = withdrawal(state, run_id)
    taken_back = approval(state, run_id) or (before.approval if before else None)
    word = Withdrawal(by=_user(), at=datetime.now(UTC), approval=taken_back)
    _write(state, _WITHDRAWN, run_id, word.model_dump_json().encode())
    (state / _APPROVED / run_id).unlink(missing_ok=True)


def rejoin(state: Path, run_id: str) -> None:
    """Take part again in a run that this site was withdrawn from.

    Raises: ConfigError: it was not.
    """
    if not re.fullmatch(RUN_ID, run_id) or not is_withdrawn(state, run_id):
        known = ", ".join(withdrawn_runs(state)) or "none"
        message = f"this site was not withdrawn from a run {run_id!r} (withdrawn from: {known})."
        raise ConfigError(message, kind="not-withdrawn")
    (state / _WITHDRAWN / run_id).unlink()


def is_withdrawn(state: Path, run_id: str) -> bool:
    """Whether this site takes no more part in a run."""
    return (state / _WITHDRAWN / run_id).exists()


def withdrawn_runs(state: Path) -> list[str]:
    """Return the ids of runs that this site has left."""
    return sorted(path.name for path in (state / _WITHDRAWN).glob("[!.]*"))


def withdrawal(state: Path, run_id: str) -> Withdrawal | None:
    """Return who took this site out of a run; None where nobody did, or a release before did not write it."""
    try:
        return Withdrawal.model_validate_json((state / _WITHDRAWN / run_id).read_bytes())
    except (OSError, ValidationError):
        return None


def approval(state: Path, run_id: str) -> Approval | None:
    """Return who approved a run, and with which configuration; None where nobody did."""
    path = state / _APPROVED / run_id
    try:
        content = path.read_bytes()
        if re.fullmatch(rb"[0-9a-f]{64}\s*", content):  # as releases before wrote it
            at = datetime.fromtimestamp(path.stat().st_mtime, UTC)
            return Approval(by="unknown", at=at, config_hash=content.decode().strip())
        return Approval.model_validate_json(content)
    except (OSError, ValidationError):
        return None


def is_approved(state: Path, run_id: str, config_hash: str) -> bool:
    """Whether a person approved this run with this configuration."""
    word = approval(state, run_id)
    return word is not None and word.config_hash == config_hash


def note_waiting(state: Path, run_id: str, run_config: str) -> None:
    """Keep what a run asked with first, for a person to read and approve.

    Raises: RequestRefused: another configuration waits under this id, or too many runs wait. OutputError: the
        state folder cannot be written.
    """
    path, content = state / _WAITING / f"{run_id}.json", run_config.encode()
    if path.is_file():
        if path.read_bytes() != content:
            raise RequestRefused(
                f"run {run_id} asked with another configuration before ({path}); have the coordinator start "
                "a new run for a changed run file.",
                code="other-config",
            )
        return
    waiting = set(waiting_runs(state))
    if len(waiting) >= _MOST_WAITING:
        raise RequestRefused(
            f"{len(waiting)} runs wait for a person already; approve some, or delete their files in "
            f"{path.parent}.",
            code="policy-approval",
            kind="too-many-waiting",
        )
    _write(state, _WAITING, path.name, content)
    files = sorted((state / _WAITING).glob("*.json"), key=lambda each: each.stat().st_mtime)
    decided = [each for each in files if each.stem not in waiting and each != path]
    for each in decided[: max(len(files) - _MOST_WAITING, 0)]:
        each.unlink(missing_ok=True)


def waiting_runs(state: Path) -> list[str]:
    """Return the ids of runs that have asked and are not approved, the newest last."""
    files = sorted((state / _WAITING).glob("*.json"), key=lambda path: path.stat().st_mtime)
    return [
        path.stem
        for path in files
        if not is_approved(state, path.stem, hashlib.sha256(path.read_bytes()).hexdigest())
    ]


def _user() -> str:
    """Return who gives this command: the account of the process, and whom it was taken on from by sudo."""
    number = os.getuid()
    try:
        name = pwd.getpwuid(number).pw_name
    except KeyError:  # a container's number without a name
        name = f"uid {number}"
    before = os.environ.get("SUDO_USER", "") if number == 0 else ""
    return f"{before} as {name}" if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._@-]*", before) else name


def _write(state: Path, folder: str, name: str, content: bytes) -> None:
    """Write a file in one step, readable by the site process alone, whoever runs the command."""
    place = state / folder
    with writing(place):
        found = state.stat()
        # Root alone can give files away, and only root needs to.
        owner = (found.st_uid, found.st_gid) if os.geteuid() == 0 else None
        place.mkdir(mode=0o700, exist_ok=True)
        if owner is not None:
            os.chown(place, *owner)
        write_atomically(place / name, content, owner=owner)
