"""The run controller: submits a run, follows it, and submits it again when what carries it out has died.

A ServerApp holds the lock of the run's folder while it works and says in `status.json` how it ended. One that
is gone without such a word was killed, or its SuperLink or SuperExec was: then the run is submitted again
and goes on from its last checkpoint. Flower is asked only where the folder says nothing.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from quorate.deploy.control.flower_cli import ACTIVE, ControlError, Flower, FlowerState, ServerNotUp
from quorate.deploy.control.run_list import RunFolder, Submission
from quorate.server.tracking.events import EVENTS_FILE, POLL_SECONDS, Event, EventsReader, RoundDone
from quorate.server.tracking.run_status import RunStatus
from quorate.shared.errors import QuorateError
from quorate.shared.protocol.bundle import bundle_dir

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 5.0
"""How long nobody may be in the run's folder before Flower is asked."""
ASK_SECONDS = (5.0, 30.0)
"""Shortest and longest time between two questions to Flower, which cost a process each."""
SERVER_SECONDS = 900.0
"""How long a server that does not answer is waited for, once the run had begun."""
STOP_SECONDS = 180.0
"""How long a run that was told to stop may take to write what it has."""
BACK_OFF = (2.0, 60.0)
"""First and longest wait before a run is submitted again; doubled each time."""
_WHY: dict[FlowerState, str] = {
    "completed": "its ServerApp ended without a word",
    "failed": "its ServerApp died",
    "unknown": "the SuperLink has lost it",
}


class Controller:
    """Carries one run through.

    Args:
        on_event: told of every event of the run, in order.
        say: told, in words, of what went wrong and what is done about it.
        max_restarts: how many times in a row the run is submitted again without a finished round between.
    """

    def __init__(
        self,
        run: RunFolder,
        flower: Flower,
        *,
        on_event: Callable[[Event], None],
        say: Callable[[str], None],
        max_restarts: int,
    ) -> None:
        self._run = run
        self._flower = flower
        self._on_event = on_event
        self._say = say
        self._max_restarts = max_restarts
        events = run.path / EVENTS_FILE
        # What earlier submissions told, the person has seen.
        self._reader = EventsReader(events, events.stat().st_size if events.exists() else 0)
        self._restarts = 0
        self.submitted = False

    def carry_out(self) -> RunStatus:
        """Submit the run (or join one that is under way) and return how it ended.

        Raises: ServerNotUp, ControlError: it cannot be submitted. QuorateError: it died too often.
        """
        with self._run.follow():
            return self._carry_out()

    def _carry_out(self) -> RunStatus:
        number = self._under_way()
        if number is None:
            number = self._submit()
        else:
            self._say(f"run {self._run.run_id} is under way already; following it")
        self.submitted = True
        while True:
            ended = self._watch(number)
            if isinstance(ended, RunStatus):
                return ended
            self._count_restart(ended)
            self._abandon(number)
            number = self._submit_again()

    def stop(self) -> RunStatus | None:
        """Have the run stopped; returns how it ended, None where that did not become known in time.

        Raises: ServerNotUp, ControlError.
        """
        number = self._run.flower_run
        if number is None:
            return None
        self._flower.stop(number)
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline:
            if (ended := self._ended(number)) is not None:
                return ended
            if not self._run.occupied and self._flower.state(number) not in ACTIVE:
                ended = self._ended(number) or _interrupted(number)
                ended.write(self._run.path)
                return ended
            time.sleep(POLL_SECONDS)
        return None

    def _under_way(self) -> int | None:
        """Return Flower's id of a submission whose ServerApp is at work."""
        status = RunStatus.read(self._run.path)
        return status.flower_run_id if status and status.state == "running" and self._run.occupied else None

    def _submit(self) -> int:
        submission = Submission.read(self._run.path)
        assert submission is not None  # `quorate run` writes it first
        with _interrupt_later():  # or a run would go on that nobody here knows of
            number = self._flower.submit(bundle_dir(), self._run.run_id)
            numbers = (*submission.flower_runs, number)
            submission.model_copy(update={"flower_runs": numbers}).write(self._run.path)
        log.debug("run %s is Flower's run %d", self._run.run_id, number)
        return number

    def _submit_again(self) -> int:
        """Submit once more, however long the server takes to come back."""
        shortest, longest = BACK_OFF
        time.sleep(min(shortest * 2 ** (self._restarts - 1), longest))
        deadline, said = time.monotonic() + SERVER_SECONDS, False
        while True:
            try:
                return self._submit()
            except ServerNotUp:
                if time.monotonic() > deadline:
                    raise
                if not said:
                    self._say("the server does not answer; waiting for it")
                said = True
                time.sleep(shortest)

    def _count_restart(self, why: str) -> None:
        self._restarts += 1
        done = self._run.rounds_done
        where = f"after round {done}" if done else "from the beginning"
        if self._restarts > self._max_restarts:
            raise QuorateError(
                f"the run was lost {self._restarts} times without a finished round between (last: {why}); "
                "find out why in `quorate server status` and the logs under state/logs, then go on with "
                f"--resume. It stands {where}.",
                kind="lost-too-often",
            )
        self._say(f"the run was lost: {why}; submitting it again, it goes on {where}")

    def _abandon(self, number: int) -> None:
        """Have Flower forget a submission that died, and with it what it still has to deliver."""
        try:
            self._flower.stop(number)
        except ControlError as error:
            log.debug("Flower's run %d: %s", number, error)

    def _watch(self, number: int) -> RunStatus | str:
        """Follow a submission; returns how it ended, or why it is lost."""
        empty_since: float | None = None
        question = _Question(self._flower, number, self._say)
        while True:
            if (ended := self._ended(number)) is not None:
                return ended
            if self._run.occupied:
                empty_since = None
                question.reset()
            else:
                empty_since = empty_since or time.monotonic()
                if time.monotonic() - empty_since >= PATIENCE_SECONDS and (lost := self._lost(question)):
                    return self._ended(number) or lost
            time.sleep(POLL_SECONDS)

    def _lost(self, question: _Question) -> RunStatus | str | None:
        """Return why nobody is in the folder of a run that has not ended; None where somebody will come."""
        status = RunStatus.read(self._run.path)
        begun = status is not None and status.flower_run_id == question.number
        if begun and status is not None and status.state == "running":
            return "its ServerApp died"
        state = question.ask()
        if state is None or state in ACTIVE:
            return None
        return _interrupted(question.number) if state == "stopped" else _WHY[state]

    def _ended(self, number: int) -> RunStatus | None:
        """Pass on what was told; return the end of this submission, once everything was told."""
        status = RunStatus.read(self._run.path)
        for event in self._reader.read():
            if isinstance(event, RoundDone):
                self._restarts = 0
            self._on_event(event)
        return status if status and status.flower_run_id == number and status.state != "running" else None


class _Question:
    """What Flower says of a run, asked more and more seldom.

    Args:
        number: Flower's id of the run.
        say: told once when it does not answer.
    """

    def __init__(self, flower: Flower, number: int, say: Callable[[str], None]) -> None:
        self.number = number
        self._flower = flower
        self._say = say
        self._silent_since: float | None = None
        self.reset()

    def reset(self) -> None:
        """Ask at once the next time."""
        self._pause, self._next = ASK_SECONDS[0], 0.0

    def ask(self) -> FlowerState | None:
        """Return Flower's answer; None where it is not yet time, or the server does not answer for now.

        Raises: ServerNotUp: it has not answered for SERVER_SECONDS.
        """
        if time.monotonic() < self._next:
            return None
        try:
            state = self._flower.state(self.number)
        except ServerNotUp:
            if self._silent_since is None:
                self._silent_since = time.monotonic()
                self._say("the server does not answer; waiting for it")
            if time.monotonic() - self._silent_since > SERVER_SECONDS:
                raise
            state = None
        else:
            self._silent_since = None
        self._next = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, ASK_SECONDS[1])
        return state


def _interrupted(number: int) -> RunStatus:
    """Return the end of a run that was stopped before its ServerApp could say so."""
    message = "the run was stopped; continue it with --resume."
    return RunStatus(state="interrupted", exit_code=130, message=message, flower_run_id=number)


@contextmanager
def _interrupt_later() -> Iterator[None]:
    """Hold a Ctrl-C back until the block is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        caught.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        raise KeyboardInterrupt
