"""Checkpoints: `output_dir/checkpoint-N/`, written whole or not at all, refused when not what was written.

A checkpoint holds all that the next round depends on: the global state, the best round so far and the
round's own record. Random numbers need no state, as every draw derives from the seed and its own name.
`SHA256SUMS` lists the files, so `sha256sum -c SHA256SUMS` checks one by hand.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

from pydantic import ValidationError

from quorate.server.rounds.best_round import BestRound
from quorate.server.tracking.records import Exclusion, Record, RoundMetrics, RoundRecord
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.aggregation import GlobalState
from quorate.shared.errors import CheckpointError, QuorateError
from quorate.shared.process.files import write_folder
from quorate.shared.protocol.messages import SiteDescription

_STATE, _PROGRESS, _SUMS = "state.safetensors", "progress.json", "SHA256SUMS"


class Progress(Record):
    """Where a run stands after a round."""

    run_id: str
    config_hash: str
    round: int
    """The last finished round."""
    best_round: int | None = None
    """The best round so far on pooled validation rows."""
    best_value: float | None = None
    """Its value of the run's metric."""
    best_sites: dict[str, tuple[float, int]] = {}
    """Site -> its value and its validation rows in that round, to compare with rounds in which some are
    missing."""
    rounds_without_improvement: int = 0
    """Evaluated rounds since then that count as no improvement."""
    initial_hash: str
    """Content hash of the adapter's seeded start, which the sites must still have on resume."""
    sites: dict[str, SiteDescription]
    refused: dict[str, Exclusion] = {}
    """Sites that could not join, and why."""
    record: RoundRecord
    """The round's record, also a line of record.jsonl."""
    metrics: RoundMetrics
    """The round's figures, also a line of metrics.jsonl."""

    @property
    def best(self) -> BestRound:
        return BestRound(self.best_round, self.best_value, self.rounds_without_improvement, self.best_sites)


def save_checkpoint(
    output_dir: Path, state: GlobalState, progress: Progress, keep: int, *, private: bool = False
) -> Path:
    """Write the checkpoint of a finished round, then drop old ones but the last `keep` and the best.

    `private` for its owner alone: it says who was drawn.
    """
    folder = output_dir / f"checkpoint-{progress.round}"
    files = {_STATE: state.stored().to_bytes(), _PROGRESS: progress.model_dump_json(indent=1).encode()}
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items())
    write_folder(folder, {**files, _SUMS: sums.encode()}, private=private)
    drop_checkpoints(output_dir, progress, keep)
    return folder


def drop_checkpoints(output_dir: Path, progress: Progress, keep: int) -> None:
    """Delete the checkpoints but the last `keep` and the best round's."""
    for round in list_checkpoints(output_dir)[:-keep]:
        if round != progress.best_round:
            shutil.rmtree(output_dir / f"checkpoint-{round}")


def list_checkpoints(output_dir: Path) -> list[int]:
    """Return the rounds that have a checkpoint, ascending."""
    found = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output_dir.glob("checkpoint-*"))
    return sorted(int(match[1]) for match in found if match)


def load_checkpoint(output_dir: Path, round: int) -> tuple[GlobalState, Progress]:
    """Read a checkpoint.

    Raises: CheckpointError: it is not, byte for byte, what was written; says which file and what to do.
    """
    folder = output_dir / f"checkpoint-{round}"
    older = [other for other in list_checkpoints(output_dir) if other < round]
    remedy = (
        f"delete {folder.name} to resume from checkpoint-{older[-1]}"
        if older
        else ("restore it from a copy, or start the run again in another folder")
    )
    try:
        listed = dict(line.split("  ", 1)[::-1] for line in (folder / _SUMS).read_text().splitlines())
        files = {name: (folder / name).read_bytes() for name in (_STATE, _PROGRESS)}
    except (OSError, ValueError) as error:
        message = f"{folder}: a file is missing or unreadable ({type(error).__name__}); {remedy}."
        raise CheckpointError(message, kind="file-missing") from error
    for name, data in files.items():
        if listed.get(name) != hashlib.sha256(data).hexdigest():
            message = f"{folder / name} is not what was written (truncated or edited); {remedy}."
            raise CheckpointError(message, kind="file-changed")
    try:
        progress = Progress.model_validate_json(files[_PROGRESS])
        state = GlobalState.from_stored(Adapter.from_bytes(files[_STATE]))
    except (ValidationError, QuorateError) as error:
        message = f"{folder} was written by another version of Quorate; {remedy}."
        raise CheckpointError(message, kind="other-version") from error
    if progress.round != round:
        message = f"{folder} holds round {progress.round}: it was renamed; {remedy}."
        raise CheckpointError(message, kind="renamed")
    return state, progress
