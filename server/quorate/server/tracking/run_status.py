"""How a run at the coordinator stands: `status.json` in its folder, written by the ServerApp."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import ValidationError

from quorate.server.tracking.records import Record
from quorate.shared.errors import OutputError
from quorate.shared.process.files import write_atomically

STATUS_FILE = "status.json"
State = Literal["running", "done", "interrupted", "quorum-not-met", "diverged", "failed"]


class RunFile(Record):
    """A record that is a file of its own in a run's folder."""

    name_of_file: ClassVar[str]
    damaged: ClassVar[str]
    """What is said of one that was edited."""

    @classmethod
    def read(cls, run_dir: Path) -> Self | None:
        """Return what the folder holds; None where it has no such file yet.

        Raises: OutputError: the file was edited.
        """
        try:
            return cls.model_validate_json((run_dir / cls.name_of_file).read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise OutputError(f"{run_dir / cls.name_of_file}: {cls.damaged}") from error

    def write(self, run_dir: Path) -> None:
        """Write it, whole or not at all, for its owner alone (it may name sites). Raises: OutputError."""
        write_atomically(run_dir / self.name_of_file, self.model_dump_json(indent=2) + "\n")


class RunStatus(RunFile):
    """What `status.json` holds.

    `running` with nobody in the folder (`quorate.server.rounds.run.locked_output` can be entered) means that
    the ServerApp died: a run that is submitted again goes on from the last checkpoint.
    """

    name_of_file = STATUS_FILE
    damaged = "not as a run writes it; delete it, then continue with --resume."
    state: State
    """Where it stands. `interrupted`: it was asked to stop; `diverged`: no site can measure its model."""
    exit_code: int | None = None
    """What the command line would return; None while it runs."""
    message: str = ""
    """What went wrong and what to do, in one sentence."""
    flower_run_id: int
    """Flower's id of this submission."""
