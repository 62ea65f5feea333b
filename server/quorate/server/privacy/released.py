"""What of a client-level private run has left the server, on disk before it leaves.

A noised model is public once the sites evaluate it, and its noise can never be drawn again. So it is written
as `released-N/` before step 8 and dropped after the round's checkpoint; a run that was killed in between goes
on with that same model instead of releasing a second one. A round that was killed before has shown nobody
anything, so running it again with other coins and noise costs nothing. `privacy.json` counts what was
released and is never taken back: whoever deletes a checkpoint and runs its round again pays for both.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from quorate.server.rounds.round_log import RoundLog
from quorate.server.tracking.records import Record
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.aggregation import GlobalState
from quorate.shared.errors import CheckpointError, QuorateError
from quorate.shared.privacy.client_level import client_rounds
from quorate.shared.privacy.privacy_event import PrivacyEvent
from quorate.shared.process.files import write_atomically, write_folder

LEDGER_FILE = "privacy.json"
_STATE, _ROUND = "state.safetensors", "round.json"


class ClientPlan(Record):
    """What was settled when the run began; a resumed run keeps to it."""

    sites: int
    """Sites that had joined. Their number is taken as public, and stays when sites come and go: one that is
    missing adds nothing."""
    sampling_probability: float
    """Chance of a site to be drawn for a round."""
    noise_multiplier: float
    """z of a round: of the noise on the sums and on the count together."""
    sum_multiplier: float
    """Standard deviation of the noise on the sum over the clipping norm: z, more with adaptive clipping."""
    count_deviation: float | None
    """Standard deviation of the noise on the count of norms within a clipping norm that adapts."""
    participation_hidden: bool
    """Whether coins are secret, and the sampling of sites so counts as amplification."""
    values: int
    """How many values of the adapter move."""

    @property
    def expected_cohort(self) -> float:
        """What noised sums are divided by."""
        return self.sampling_probability * self.sites

    @property
    def noise_on_mean(self) -> float:
        """Expected L2 norm of the noise on the mean update, over the clipping norm."""
        return self.sum_multiplier * math.sqrt(self.values) / self.expected_cohort

    @property
    def amplified(self) -> bool:
        """Whether the chance of not being drawn counts."""
        return self.participation_hidden and self.sampling_probability < 1

    def events(self, releases: int) -> tuple[PrivacyEvent, ...]:
        """Return what so many releases that a site may be part of cost it."""
        event = client_rounds(
            self.noise_multiplier,
            sites=self.sites,
            cohort=self.expected_cohort,
            rounds=releases,
            participation_hidden=self.participation_hidden,
        )
        return (event,) if releases else ()


class ReleaseLedger(Record):
    """What has been released (`privacy.json`)."""

    plan: ClientPlan
    releases: int = 0
    """Noised sums that the sites may have seen the effect of."""
    asked: dict[str, int] = {}
    """Site -> those of them that it was drawn for."""
    last: str | None = None
    """Content hash of the last state that was released."""

    @property
    def events(self) -> tuple[PrivacyEvent, ...]:
        """What it cost the site that it cost most.

        Without amplification a site pays for the releases it was drawn for: others do not hold its data, and
        who was drawn does not depend on any data.
        """
        most = self.releases if self.plan.amplified else max(self.asked.values(), default=0)
        return self.plan.events(most)

    def after(self, released: Released) -> ReleaseLedger:
        """Return the ledger with this release in it, once."""
        if released.state_hash == self.last:
            return self
        asked = {**self.asked, **{site: self.asked.get(site, 0) + 1 for site in released.cohort}}
        return self.model_copy(
            update={"releases": self.releases + 1, "asked": asked, "last": released.state_hash}
        )

    def write(self, output_dir: Path) -> None:
        """Write `privacy.json`, for the server alone: it says who was drawn."""
        write_atomically(output_dir / LEDGER_FILE, self.model_dump_json(indent=1).encode())

    @classmethod
    def read(cls, output_dir: Path) -> ReleaseLedger | None:
        """Read `privacy.json`; None where no private run has begun.

        Raises: CheckpointError: it is not what was written.
        """
        path = output_dir / LEDGER_FILE
        if not path.exists():
            return None
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise missing_ledger(output_dir) from error


class Released(Record):
    """A round whose model is noised and may have been seen."""

    round: int
    started_from: str
    """Content hash of the state before it."""
    state_hash: str
    """Content hash of the state after it."""
    cohort: tuple[str, ...]
    log: RoundLog
    """What was noted down until then."""


@dataclass(frozen=True)
class Pending:
    """A round that was released and has no checkpoint yet."""

    released: Released
    state: GlobalState


def write_released(output_dir: Path, released: Released, state: GlobalState) -> None:
    """Write `released-N/`, for the server alone: it says who was drawn."""
    files = {_STATE: state.stored().to_bytes(), _ROUND: released.model_dump_json(indent=1).encode()}
    write_folder(_folder(output_dir, released.round), files, private=True)


def read_released(output_dir: Path, round: int, started_from: str) -> Pending | None:
    """Return round `round` as it was released, if it was and goes on from this state.

    Raises: CheckpointError: it is damaged.
    """
    folder = _folder(output_dir, round)
    if not folder.exists():
        return None
    try:
        released = Released.model_validate_json((folder / _ROUND).read_bytes())
        arrays = Adapter.from_bytes((folder / _STATE).read_bytes())
    except (OSError, ValidationError, QuorateError) as error:
        raise _damaged(folder) from error
    if arrays.content_hash != released.state_hash:
        raise _damaged(folder)
    return (
        Pending(released, GlobalState.from_stored(arrays)) if released.started_from == started_from else None
    )


def drop_released(output_dir: Path, keep: int | None = None) -> None:
    """Delete all `released-N/` but that of round `keep`."""
    for folder in output_dir.glob("released-*"):
        if keep is None or folder != _folder(output_dir, keep):
            shutil.rmtree(folder)


def missing_ledger(output_dir: Path) -> CheckpointError:
    """Return what to say where `privacy.json` is gone or damaged."""
    return CheckpointError(
        f"{output_dir / LEDGER_FILE} is missing, damaged or of another version, and without it nobody knows "
        "what the run has spent; restore it from a copy, or start the run again in another folder (-o).",
        kind="ledger-lost",
    )


def _folder(output_dir: Path, round: int) -> Path:
    return output_dir / f"released-{round}"


def _damaged(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{folder} is not what was written (truncated or edited), or of another release; restore it from a "
        "copy, have the release that wrote it finish the round, or delete it: its round is then run, and its "
        "privacy paid for, once more.",
        kind="release-damaged",
    )
