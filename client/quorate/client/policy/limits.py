"""How long a site works for others: minutes of a round, minutes and runs of any 24 hours. No torch here.

Rounds and steps of a run follow from its configuration and are limited by `quorate.client.policy.gate`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from quorate.client.policy.site_config import PolicyConfig
from quorate.client.runs.run_history import RunHistory
from quorate.client.site.request import Handler, Request, failed
from quorate.shared.errors import QuorateError, RequestRefused
from quorate.shared.progress import StepEvent
from quorate.shared.protocol.messages import Update

DAY = 86400.0
"""Seconds of the span that limits by the day look back on."""


class WorkLimits:
    """A handler that ends work which takes longer than the policy allows.

    Args:
        policy: the rules as they are now.
        book: what was worked and begun before.
        begins: called before a run's `join`, or what else it begins with, is answered: data are read again
            then.
        inner: does the work, and has `on_step` called at every optimiser step and between its passes.
    """

    def __init__(
        self, policy: Callable[[], PolicyConfig], book: RunHistory, begins: Callable[[], None], inner: Handler
    ) -> None:
        self._policy = policy
        self._book = book
        self._begins = begins
        self._inner = inner
        self._started = self._round_started = time.monotonic()
        self._round: int | None = None
        self._before = 0.0

    def handle(self, request: Request) -> Update:
        try:
            self._admit(request)
            # A run need not join: its first message, whatever it is, is held against the data as they are.
            if request.header.phase == "join" or not self._book.has_begun(request.header.run_id):
                self._begins()
        except QuorateError as error:
            return failed(request, error)
        return self._inner.handle(request)

    def on_step(self, event: StepEvent) -> None:
        """Raise RequestRefused at the step or pass that goes beyond a limit: the request ends by its code."""
        now, policy = time.monotonic(), self._policy()
        if event.round != self._round:
            if self._round is not None:  # several rounds in one request: each has its own minutes
                self._round_started = now
            self._round = event.round
        if _over(now - self._round_started, policy.max_minutes_per_round):
            raise RequestRefused(
                f"policy.max_minutes_per_round is {policy.max_minutes_per_round:g}, and after that round "
                f"{event.round} is at step {event.step} of {event.steps}; raise it in site.yaml, or have the "
                "coordinator lower training.max_steps (or num_train_epochs).",
                code="policy-minutes",
            )
        self._check_day(now - self._started)
        self._book.tick(event)

    def _admit(self, request: Request) -> None:
        self._started = self._round_started = time.monotonic()
        self._round = None
        since, most = time.time() - DAY, self._policy().max_runs_per_day
        self._before = self._book.seconds_since(since)
        if request.header.phase != "finish":  # a result is the site's own, and nothing is worked on for it
            self._check_day(0.0)
        if most is not None and not self._book.has_begun(request.header.run_id):
            begun = self._book.begun_since(since)
            if begun >= most:
                raise RequestRefused(
                    f"policy.max_runs_per_day is {most}, and {begun} runs have begun in the last 24 hours; "
                    "raise it in site.yaml, or wait.",
                    code="policy-runs",
                )

    def _check_day(self, seconds: float) -> None:
        most = self._policy().max_minutes_per_day
        if _over(self._before + seconds, most):
            raise RequestRefused(
                f"policy.max_minutes_per_day is {most:g}, and this site has worked so long in the last 24 "
                "hours; raise it in site.yaml, or wait.",
                code="policy-minutes",
            )


def _over(seconds: float, minutes: float | None) -> bool:
    return minutes is not None and seconds > 60 * minutes
