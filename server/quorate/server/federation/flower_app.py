"""Flower's ServerApp: carries out one run in its folder, and says in `status.json` there how it stands.

A SuperExec starts a process with it for every submission. Nothing of a run but its id comes through Flower:
`state/runs/RUN_ID/` of the federation holds run.yaml, and gets all that a simulation's output folder gets.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from quorate.server.exchange.flower_internals import FlowerRun, RunNotRunningException
from quorate.server.exchange.flower_messages import QuorateGrid
from quorate.server.federation.folder import FederationFolder
from quorate.server.federation.nodes import Nodes
from quorate.server.results.complete import complete_run
from quorate.server.results.local_reference import left_out
from quorate.server.rounds.loop import run_rounds
from quorate.server.rounds.run import RUN_FILE, Run, locked_output
from quorate.server.tracking.events import telling_warnings
from quorate.server.tracking.run_status import RunStatus
from quorate.server.tracking.trackers import configured_trackers
from quorate.shared.config.load import load_run
from quorate.shared.errors import ConfigError, ModelDiverged, OutputError, QuorateError, QuorumNotMet
from quorate.shared.process.files import open_to_append, writing
from quorate.shared.protocol.bundle import RUN_KEY

log = logging.getLogger(__name__)

FEDERATION = "QUORATE_FEDERATION"
"""Environment variable: the federation's folder, set by `quorate server start`."""
LOG_FILE = "server.log"
INTERNAL, INTERRUPTED = 1, 130
_LOCK_SECONDS = 60.0
"""How long to wait for an earlier process of the same run to leave its folder."""


class StoppableGrid(QuorateGrid):
    """A grid in which a run that somebody stopped ends as by Ctrl-C: what is there gets written.

    Flower raises a BaseException of its own, which no step of a run would expect.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def set_run(self, run: FlowerRun) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> FlowerRun:
        return self._grid.run

    def get_node_ids(self) -> Iterable[int]:
        with _stoppable():
            return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        with _stoppable():
            return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        with _stoppable():
            return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        with _stoppable():
            return self._grid.send_and_receive(messages, timeout=timeout)


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Carry out the run that the run configuration names.

    Raises: QuorateError: it cannot be carried out, or ended early; status.json says the same.
    """
    folder, run_id = _asked_for(context)
    run_dir = folder.runs / run_id
    status = partial(RunStatus, flower_run_id=context.run_id)
    logging_to = _logging_to(run_dir / LOG_FILE)  # this process has no terminal
    with _locked_output(run_dir), logging_to, telling_warnings(run_dir), _interruptible():
        status(state="running").write(run_dir)
        try:
            carry_out(StoppableGrid(grid), folder, run_id)
        except KeyboardInterrupt:
            message = "the run was stopped; continue it with --resume."
            status(state="interrupted", exit_code=INTERRUPTED, message=message).write(run_dir)
            # Flower ends a run in order after an Exception alone.
            raise QuorateError(message, kind="run-stopped") from None
        except (QuorumNotMet, ModelDiverged) as error:
            state = "diverged" if isinstance(error, ModelDiverged) else "quorum-not-met"
            status(state=state, exit_code=error.exit_code, message=str(error)).write(run_dir)
            raise
        except QuorateError as error:
            message = f"{type(error).__name__}: {error}"
            status(state="failed", exit_code=error.exit_code, message=message).write(run_dir)
            raise
        except Exception as error:
            log.exception("internal error")
            message = f"internal error ({type(error).__name__}); the traceback is in {run_dir / LOG_FILE}."
            status(state="failed", exit_code=INTERNAL, message=message).write(run_dir)
            raise
        status(state="done", exit_code=0).write(run_dir)


def carry_out(grid: Grid, folder: FederationFolder, run_id: str) -> None:
    """Run (or resume) the rounds, measure and write what came of them, and send it to the sites.

    Raises: QuorateError: it cannot be carried out. QuorumNotMet, ModelDiverged, KeyboardInterrupt: it ended
        early, and what finished rounds gave is written.
    """
    run_dir = folder.runs / run_id
    config = load_run(run_dir / RUN_FILE)
    run = Run.open(config, run_dir, resume=True, trackers=configured_trackers(config), run_id=run_id)
    if why := left_out(config):
        log.warning("evaluation.references are left out: %s", why)
    result = run_rounds(grid, run, Nodes.read(folder).sites)
    complete_run(grid, run, result)


def _asked_for(context: Context) -> tuple[FederationFolder, str]:
    """Return the federation and the run. The run id names a folder, so nothing else may be in it."""
    run_id, home = str(context.run_config.get(RUN_KEY, "")), os.environ.get(FEDERATION)
    if not re.fullmatch(r"[0-9a-f]{16}", run_id):
        message = f"run: {run_id!r} is no run id (16 hexadecimal digits); submit runs with `quorate run`."
        raise ConfigError(message)
    if not home:
        raise ConfigError(f"{FEDERATION} is not set; start the server with `quorate server start`.")
    folder = FederationFolder(Path(home))
    if not (folder.runs / run_id / RUN_FILE).is_file():
        raise ConfigError(f"{folder.runs / run_id} holds no {RUN_FILE}; submit runs with `quorate run`.")
    return folder, run_id


@contextmanager
def _locked_output(run_dir: Path) -> Iterator[None]:
    """Enter `locked_output`, once an earlier process of this run has left: it may still be writing."""
    deadline = time.monotonic() + _LOCK_SECONDS
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked_output(run_dir))
                break
            except OutputError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(1.0)
        yield


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Append our log to a file, for its owner alone: it names sites that were asked."""
    with writing(path):
        os.close(open_to_append(path, private=True))
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    ours = logging.getLogger("quorate")
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        handler.close()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into KeyboardInterrupt, so that finished rounds get written.

    Flower raises SIGINT in this process when its run is stopped, and also when the SuperExec that started it
    is gone. Then nobody asked for an end: Flower's own handler ends the process at once, status.json keeps
    saying `running`, and the run goes on when it is submitted again.
    """
    parent = os.getppid()
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}

    def interrupt(number: int, frame: FrameType | None) -> None:
        theirs = before[signal.Signals(number)]
        if os.getppid() != parent and callable(theirs):
            log.warning("the process that started this one is gone; the run can be submitted again")
            theirs(number, frame)
        raise KeyboardInterrupt

    for each in before:
        signal.signal(each, interrupt)
    try:
        yield
    finally:
        for each, theirs in before.items():
            signal.signal(each, theirs)


@contextmanager
def _stoppable() -> Iterator[None]:
    try:
        yield
    except RunNotRunningException:
        raise KeyboardInterrupt from None
