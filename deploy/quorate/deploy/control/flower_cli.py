"""The control side of Flower: its command `flwr`, as a process of its own. The only place that calls it.

The command reads the connection from `config.toml` in FLWR_HOME, which the server writes when it starts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quorate.deploy.server.flower_internals import CLI
from quorate.deploy.server.server_paths import ServerPaths
from quorate.server.federation.folder import FederationFolder
from quorate.shared.errors import QuorateError

CONFIG_FILE = "config.toml"
COMMAND_SECONDS = 180
"""Longest wait for one `flwr` [s]; on a busy machine its imports alone take half a minute."""
_NOT_UP = "Connection to the SuperLink is unavailable"
_NO_SUCH_RUN = "[code: 16]"
_FINISHED_ALREADY = "[code: 18]"

FlowerState = Literal["pending", "starting", "running", "completed", "failed", "stopped", "unknown"]
"""What Flower says of a run; `unknown`: it knows no such run, as its database was lost."""
ACTIVE: tuple[FlowerState, ...] = ("pending", "starting", "running")


class ControlError(QuorateError):
    """Flower refuses what it was asked, or its command fails."""


class ServerNotUp(ControlError):
    """The SuperLink does not answer."""


@dataclass(frozen=True)
class Flower:
    """Runs on one SuperLink.

    Args:
        home: FLWR_HOME; holds config.toml.
        connection: name of the `[superlink.NAME]` in it.
    """

    home: Path
    connection: str

    @classmethod
    def of(cls, folder: FederationFolder) -> Flower:
        """Return the control side of a federation's server."""
        return cls(ServerPaths(folder).flower, folder.config.name)

    def submit(self, bundle: Path, run_id: str) -> int:
        """Start a Flower run of the bundle, for our run `run_id`; returns Flower's own id.

        Raises: ServerNotUp, ControlError.
        """
        answer = self._ask("run", str(bundle), self.connection, "--run-config", f'run="{run_id}"')
        try:
            return int(answer["run-id"])
        except (KeyError, TypeError, ValueError) as error:
            raise ControlError(f"`flwr run` names no run id (keys: {', '.join(answer)}).") from error

    def state(self, flower_run_id: int) -> FlowerState:
        """Return what Flower says of a run. Raises: ServerNotUp, ControlError."""
        try:
            answer = self._ask("list", self.connection, "--run-id", str(flower_run_id))
        except ControlError as error:
            if _NO_SUCH_RUN in str(error):
                return "unknown"
            raise
        return _state_in(answer)

    def stop(self, flower_run_id: int) -> None:
        """Stop a run; one that has ended already is fine. Raises: ServerNotUp, ControlError."""
        try:
            self._ask("stop", str(flower_run_id), self.connection)
        except ControlError as error:
            if _NO_SUCH_RUN not in str(error) and _FINISHED_ALREADY not in str(error):
                raise

    def _ask(self, *arguments: str) -> dict[str, Any]:
        """Run `flwr ARGUMENTS --format json` and return its answer."""
        if not (self.home / CONFIG_FILE).is_file():
            raise ServerNotUp(
                f"{self.home / CONFIG_FILE} is not there: the federation's server was never started; run "
                "`quorate server start`.",
                kind="server-never-started",
            )
        command = [sys.executable, "-m", CLI, *arguments, "--format", "json"]
        bypass = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"]))
        environment = {**os.environ, "FLWR_HOME": str(self.home), "NO_PROXY": bypass}
        try:
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                timeout=COMMAND_SECONDS,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C is ours to handle, not the child's
            )
        except subprocess.TimeoutExpired as error:
            raise ServerNotUp(
                f"`flwr {arguments[0]}` gave no answer in {COMMAND_SECONDS} s; see `quorate server status`."
            ) from error
        return self._answer(arguments[0], done)

    def _answer(self, verb: str, done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
        try:
            answer = json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError as error:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            said = f": {last[0][:300]}" if last else ""
            raise ControlError(f"`flwr {verb}` failed with exit code {done.returncode}{said}.") from error
        if answer.get("success"):
            return dict(answer)
        said = " ".join(str(answer.get("error-message", "")).split())
        if _NOT_UP in said:
            raise ServerNotUp(
                "the federation's SuperLink does not answer; start it with `quorate server start`, or see "
                "`quorate server status`.",
                kind="server-silent",
            )
        raise ControlError(f"`flwr {verb}`: {said[-300:]}")


def _state_in(answer: dict[str, Any]) -> FlowerState:
    """Return the state in an answer of `flwr list`: `running`, `finished:failed`, ..."""
    try:
        text = answer["runs"][0]["status"].rpartition(":")[2]
    except (KeyError, IndexError, AttributeError) as error:
        raise ControlError("`flwr list` answers in another form than Flower 1.42's.") from error
    known: tuple[FlowerState, ...] = (*ACTIVE, "completed", "failed", "stopped")
    for state in known:
        if text == state:
            return state
    raise ControlError(f"`flwr list` names the unknown state {text[:40]!r}.")
