"""Steps 2 to 4 of a round: ask sites, wait for a quorum and a grace period, check what comes back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TypeVar

from flwr.serverapp import Grid

from quorate.server.exchange.flower_messages import POLL_SECONDS, UNREACHABLE, Exchange, decode
from quorate.server.exchange.presence import FIRST_PAUSE, Presence
from quorate.server.rounds.update_checks import check_belongs
from quorate.server.tracking.records import Exclusion
from quorate.shared.errors import QuorateError
from quorate.shared.protocol.messages import RoundRequest, Update

log = logging.getLogger(__name__)

T = TypeVar("T")
Check = Callable[[RoundRequest, Update], T]
"""Raises where an answer does not count, and returns what is handed on of it."""

REASONS = {
    "timeout": "did not reply in time",
    "away": "has not answered since an earlier exchange; it is asked again, and counts once it answers",
    "absent": "is not connected; its IT can see why with `quorate site status`",
    "unreachable": "could not be reached, or its ClientApp failed; the logs of Flower say why",
    "data": "could not use its own data; its log says why",
    "model": "could not load or adapt the base model; its log says why",
    "refused": "refused the request; its log says which rule",
    "policy-task": "its policy does not allow this task",
    "policy-data": "its policy does not allow this data alias, or it holds no such data",
    "policy-model": "its policy does not list the base model's sha256, or the run does not name it",
    "policy-rank": "its policy allows no adapter of this rank",
    "policy-aggregation": "its policy does not allow this aggregation rule",
    "policy-base": "its policy lets no rule change its base model so far",
    "policy-modules-to-save": "its policy does not allow a part of the model to be trained whole",
    "policy-head": "its policy allows no head with so many hidden units",
    "policy-rows": "has fewer training rows than its policy asks for",
    "policy-rounds": "its policy allows fewer rounds",
    "policy-steps": "its policy allows fewer optimiser steps in a round",
    "policy-minutes": "has worked as long on a round, or in a day, as its policy allows",
    "policy-runs": "has begun as many runs in a day as its policy allows",
    "site-file": "has a site.yaml that cannot be used; its log says what is wrong in it",
    "policy-approval": "a person at the site must approve this run first (quorate site approve)",
    "policy-privacy": "asks for differential privacy, or the run's privacy does not cover the request",
    "policy-budget": "has too little privacy budget left for this run, or none for its unit of privacy",
    "ledger": "has a privacy ledger that is not as it was written; its people must look into it",
    "out-of-memory": "has too little memory for this run: lower training.per_device_train_batch_size, or set "
    "training.gradient_checkpointing",
    "device-lost": "lost its GPU in the middle of the work, and is starting again; its log says why",
    "withdrawn": "was withdrawn from this run by its people",
    "bundle": "did not admit the bundle of code; both sides need the same release of quorate",
    "other-config": "knows this run id under another run configuration",
    "conflict": "has answered this round from another start",
    "outdated": "has answered a later round of this run",
    "oversized": "got a message above its size limit",
    "expired": "got the request too late, or was not up again in time",
    "protocol": "sent something that is not an answer to the request",
    "non-finite": "sent an update with NaN or infinity, or its training diverged: lower the learning rate",
    "adapter": "sent arrays with other names or shapes than were asked for",
    "rows": "answered for other rows than it joined with",
    "norm": "moved further than federation.max_update_norm",
    "version": "runs another release of Quorate or of a library; install the one that the server runs",
    "config": "worked under another run configuration, or cannot use this one; its log says why",
}


TRANSIENT = (UNREACHABLE,)
"""Codes that a site may recover from by itself: a process that was killed or is starting again."""
_FIRST_REASK, _LONGEST_REASK = 2.0, 20.0
"""Seconds before a site that could not be reached is asked again; doubled each time."""
TELL_SECONDS = 10.0
"""How often it is said who is being waited for [s]."""


def exclusion(code: str, reason: str | None = None) -> Exclusion:
    """Return why a site does not count, in words."""
    return Exclusion(code=code, reason=reason or REASONS.get(code, "failed; its log says why"))


@dataclass
class Answers:
    """The account of one exchange with a cohort.

    It ends when all sites that are not known to be away have answered and the quorum is there; `grace` after
    the quorum was there; or after `timeout`.

    Args:
        sites: node id -> site name.
        quorum: good answers after which only `grace` seconds more are waited for the rest.
        timeout: longest wait [s].
        grace: [s].
        reask: how long a site that could not be reached is asked again [s]; an identical request is answered
            from what the site has stored.
        optional: the run can do without this exchange. Then no more than `grace + reask` is waited for the
            quorum where half of the sites have answered in any way, or all are known to be away. A site that
            lets it pass is not taken to be away for that alone: it may be at work.
        expected: seconds that the work takes anyway; no grace begins before.
        presence: who is known to be away.
        on_wait: told now and then who is being waited for: site -> seconds since it was asked.
        waiting_for_people: code of an error that makes the quorum like a good answer; None for none.
        good: good answers so far.
        heard: answers of any kind so far.
        longest: seconds that the last good answer took.
    """

    sites: Mapping[int, str]
    quorum: int
    timeout: float
    grace: float
    reask: float = 0.0
    optional: bool = False
    expected: float = 0.0
    presence: Presence = field(default_factory=Presence)
    on_wait: Callable[[Mapping[str, float]], None] = lambda _sites: None
    waiting_for_people: str | None = None
    good: int = 0
    heard: int = 0
    longest: float = 0.0
    excluded: dict[str, Exclusion] = field(default_factory=dict)
    bytes_down: dict[str, int] = field(default_factory=dict)
    bytes_up: dict[str, int] = field(default_factory=dict)

    def ask(
        self, grid: Grid, requests: Mapping[int, RoundRequest], check: Check[T]
    ) -> Iterator[tuple[str, T]]:
        """Send `requests` (node -> request) and yield (site, what `check` returns) for each good answer.

        Answers are handed on as they arrive. An answer that fails, or does not come, is noted in `excluded`
        with its reason; the others go on.
        """
        started = time.monotonic()
        self.presence.look(grid)
        away = requests.keys() - self.presence.present(requests)
        exchange, again = Exchange(grid, self.timeout), _Reasks(started + min(self.reask, self.timeout))
        patience = _Patience(self, started, len(requests))

        def send(nodes: Iterable[int]) -> None:
            asked = {node: requests[node] for node in nodes}
            exchange.send(asked)
            for node, request in asked.items():
                again.sent(node)
                site = self.sites[node]
                self.bytes_down[site] = self.bytes_down.get(site, 0) + len(request.encoded)

        send(node for node in requests if self.presence.to_ask(node))
        missing, lost = set(requests), set[int]()
        while missing:
            arrived = False
            for node, content in exchange.pull():
                arrived = True
                if content in TRANSIENT and again.plan(node):
                    continue
                exchange.settle(node)
                missing.discard(node)
                self.heard += 1
                lost |= {node} if content in TRANSIENT else set()
                if node not in lost:
                    self.presence.heard(node)
                self.bytes_up[self.sites[node]] = len(content) if isinstance(content, bytes) else 0
                checked = self._checked(self.sites[node], requests[node], decode(content), check)
                if checked is not None:
                    self.longest = time.monotonic() - started
                    yield self.sites[node], checked
            # Only between two looks at the grid: what has arrived counts, however long it takes to add up,
            # and a grid in this process answers nobody before the next look.
            if arrived or not missing:
                continue
            silent = missing - exchange.waiting - again.due.keys()
            send(again.ready(missing) | (self.presence.look(grid) & silent))
            present = self.presence.present(missing)
            if patience.over(bool(present)):
                break
            if not present:  # they are needed all the same
                send(silent)
            patience.tell({self.sites[node]: self.presence.away.get(node, started) for node in missing})
            time.sleep(POLL_SECONDS)
        for node in missing:
            code = UNREACHABLE if node in again.due else "away" if node in away else "timeout"
            self.excluded[self.sites[node]] = exclusion(code)
        left = exchange.leave()
        if self.optional and not patience.at_end:
            missing -= self.presence.at_work(missing & set(left.values()), grid)
        self.presence.missed(dict.fromkeys(missing | lost, started), left)

    def _checked(self, site: str, request: RoundRequest, answer: Update | str, check: Check[T]) -> T | None:
        if isinstance(answer, str):
            self.excluded[site] = exclusion(answer)
            return None
        try:
            check_belongs(request, answer)
            checked = check(request, answer)
        except QuorateError as error:
            self.excluded[site] = exclusion(error.code, str(error))
            return None
        self.good += 1
        return checked


class _Patience:
    """How long an exchange goes on.

    Args:
        answers: its account.
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


class _Reasks:
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


def in_order(order: Sequence[str], answers: Answers, arriving: Iterator[tuple[str, T]]) -> Iterator[T]:
    """Yield `arriving` in the order of sites: floating-point sums depend on it, and who is first is chance.

    Holds an answer only while a site before it may still answer; a rule that streams thus holds all but one
    at worst.
    """
    early: dict[str, T] = {}
    waiting = list(order)
    for site, answer in arriving:
        early[site] = answer
        while waiting and (waiting[0] in early or waiting[0] in answers.excluded):
            if (first := waiting.pop(0)) in early:
                yield early.pop(first)
    for site in waiting:
        if site in early:
            yield early[site]
