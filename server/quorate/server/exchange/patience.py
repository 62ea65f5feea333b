"""How long an exchange goes on, and who is asked again meanwhile."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Set
from typing import TYPE_CHECKING

from quorate.server.exchange.presence import FIRST_PAUSE

if TYPE_CHECKING:
    from quorate.server.exchange.exchange import Answers

log = logging.getLogger(__name__)

TELL_SECONDS = 10.0
"""How often it is said who is being waited for [s]."""
_FIRST_REASK, _LONGEST_REASK = 2.0, 20.0
"""Seconds before a site that could not be reached is asked again; doubled each time."""


class Patience:
    """How long an exchange goes on.

    Args:
        answers: its account so far, and its limits.
        started: when it began (`time.monotonic`).
        asked: how many sites it is with.
    """

    def __init__(self, answers: Answers, started: float, asked: int) -> None:
        self._answers = answers
        self._started = started
        self._half = (asked + 1) // 2
        self._quorum = min(answers.quorum, asked) if answers.optional else answers.quorum
        self._since: dict[str, float] = {}
        self._told = started

    def over(self, present: bool) -> bool:
        """Whether to wait no longer, for sites of which some are not known to be away (`present`)."""
        answers, now = self._answers, time.monotonic()
        unapproved = [e for e in answers.excluded.values() if e.code == answers.waiting_for_people]
        counted = answers.good + len(unapproved)
        reached = answers.heard >= 1 if answers.optional else counted >= self._quorum
        if not present and reached:
            return True
        waits = [("quorum", counted >= self._quorum, answers.grace)]
        if answers.optional:
            half = answers.heard >= self._half or not present
            waits.append(("half", half, answers.grace + answers.reask))
        for name, reached, seconds in waits:
            if reached:
                since = self._since.setdefault(name, max(now, self._started + answers.expected))
                if now - since >= seconds:
                    return True
        return self.at_end

    @property
    def at_end(self) -> bool:
        """Whether the longest wait is over."""
        return time.monotonic() - self._started >= self._answers.timeout

    def tell(self, waiting: Mapping[str, float]) -> None:
        """Say, now and then, who is being waited for: site -> since when (`time.monotonic`)."""
        now = time.monotonic()
        if now - self._told >= TELL_SECONDS:
            self._told = now
            self._answers.on_wait({site: now - since for site, since in sorted(waiting.items())})


class Reasks:
    """Which nodes are to be asked again, and when.

    A node that cannot be reached is asked soon, for as long as that goes on; a silent one seldom: it may be
    at work, but the message, or its answer, may as well be lost.

    Args:
        until: after this moment nobody who cannot be reached is asked again (`time.monotonic`).
    """

    def __init__(self, until: float) -> None:
        self._until = until
        self._delays: dict[int, float] = {}
        self._silent: dict[int, tuple[float, float]] = {}
        self.due: dict[int, float] = {}

    def sent(self, node: int) -> None:
        """Take note that this node was asked."""
        _, pause = self._silent.get(node, (0.0, FIRST_PAUSE / 2))
        self._silent[node] = (time.monotonic() + 2 * pause, 2 * pause)

    def plan(self, node: int) -> bool:
        """Ask this node, which could not be reached, again later; returns whether there is time for that."""
        delay = self._delays.get(node, _FIRST_REASK)
        if time.monotonic() + delay > self._until:
            return False
        self._delays[node] = min(2 * delay, _LONGEST_REASK)
        self.due[node] = time.monotonic() + delay
        log.info("node %d could not be reached; asking it again in %.0f s", node, delay)
        return True

    def ready(self, missing: Set[int]) -> set[int]:
        """Return the nodes of `missing` whose time has come."""
        now = time.monotonic()
        ready = {node for node, moment in self.due.items() if moment <= now}
        silent = {node for node, (moment, _) in self._silent.items() if moment <= now}
        for node in ready:
            del self.due[node]
        return (ready | (silent - self.due.keys())) & missing
