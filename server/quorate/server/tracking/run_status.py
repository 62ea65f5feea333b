"""How a run at the coordinator stands: `status.json` in its folder, written by the ServerApp."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from quorate.server.tracking.records import Record
from quorate.shared.errors import OutputError
from quorate.shared.process.files import write_atomically

STATUS_FILE = "status.json"
State = Literal["running", "done", "interrupted", "quorum-not-met", "diverged", "failed"]


class RunStatus(Record):
    """What `status.json` holds.

    `running` with nobody in the folder (`quorate.server.rounds.run.locked_output` can be entered) means that
    the ServerApp died: a run that is submitted again goes on from the last checkpoint.
    """

    state: State
    """Where it stands. `interrupted`: it was asked to stop; `diverged`: no site can measure its model."""
    exit_code: int | None = None
    """What the command line would return; None while it runs."""
    message: str = ""
    """What went wrong and what to do, in one sentence."""
    flower_run_id: int
    """Flower's id of this submission."""

    @classmethod
    def read(cls, run_dir: Path) -> RunStatus | None:
        """Return the status of the run in this folder; None when no ServerApp has begun yet.

        Raises: OutputError: the file was edited.
        """
        try:
            return cls.model_validate_json((run_dir / STATUS_FILE).read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise OutputError(
                f"{run_dir / STATUS_FILE}: not as a run writes it; delete it, then continue with --resume."
            ) from error

    def write(self, run_dir: Path) -> None:
        """Write it, whole or not at all, for its owner alone (it may name sites). Raises: OutputError."""
        write_atomically(run_dir / STATUS_FILE, self.model_dump_json(indent=2) + "\n")
