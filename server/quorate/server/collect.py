"""Steps 2 to 4 of a round: ask sites, wait for a quorum and a grace period, check what comes back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from quorate.server.checks import check_belongs
from quorate.server.flower import POLL_SECONDS, Exchange, decode
from quorate.server.records import Exclusion
from quorate.shared.errors import QuorateError
from quorate.shared.messages import RoundRequest, Update

log = logging.getLogger(__name__)

Check = Callable[[RoundRequest, Update], None]

REASONS = {
    "timeout": "did not reply in time",
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
    "norm": "moved further than federation.max_update_norm",
    "version": "runs another release of Quorate or of a library; install the one that the server runs",
    "config": "worked under another run configuration, or cannot use this one; its log says why",
}


TRANSIENT = ("unreachable",)
"""Codes that a site may recover from by itself: a process that was killed or is starting again."""
_FIRST_REASK, _LONGEST_REASK = 2.0, 20.0
"""Seconds before a site is asked again; doubled each time."""


def exclusion(code: str, reason: str | None = None) -> Exclusion:
    """Return why a site does not count, in words."""
    return Exclusion(code=code, reason=reason or REASONS.get(code, "failed; its log says why"))


@dataclass
class Answers:
    """The books of one exchange with a cohort.

    Args:
        sites: node id -> site name.
        quorum: good answers after which only `grace` seconds more are waited for the rest.
        timeout: longest wait [s].
        grace: [s].
        reask: how long a site that could not be reached is asked again [s]; an identical request is answered
            from what the site has stored.
    """

    sites: Mapping[int, str]
    quorum: int
    timeout: float
    grace: float
    reask: float = 0.0
    good: int = 0
    excluded: dict[str, Exclusion] = field(default_factory=dict)
    bytes_down: dict[str, int] = field(default_factory=dict)
    bytes_up: dict[str, int] = field(default_factory=dict)

    def ask(
        self, grid: Grid, requests: Mapping[int, RoundRequest], check: Check
    ) -> Iterator[tuple[str, Update]]:
        """Send `requests` (node -> request) and yield (site, update) for each answer that passes `check`.

        Answers are handed on as they arrive. An answer that fails, or does not come, is noted in `excluded`
        with its reason; the others go on.
        """
        started = time.monotonic()
        exchange, again = Exchange(grid, self.timeout), _Reasks(started + min(self.reask, self.timeout))
        exchange.send(requests)
        for node, request in requests.items():
            self.bytes_down[self.sites[node]] = len(request.encoded)
        missing = set(requests)
        enough_since: float | None = None
        while exchange.waiting or again.due:
            arrived = False
            for node, content in exchange.pull():
                arrived = True
                if content in TRANSIENT and again.plan(node):
                    continue
                missing.discard(node)
                self.bytes_up[self.sites[node]] = len(content) if isinstance(content, bytes) else 0
                update = self._checked(self.sites[node], requests[node], decode(content), check)
                if update is not None:
                    yield self.sites[node], update
            exchange.send({node: requests[node] for node in again.ready()})
            if arrived or not (exchange.waiting or again.due):
                continue
            # Only between two looks at the grid: what has arrived counts, however long it takes to add up.
            if self.good >= self.quorum:
                enough_since = enough_since or time.monotonic()
                if time.monotonic() - enough_since >= self.grace:
                    break
            left = started + self.timeout - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(POLL_SECONDS, left))
        for node in missing:
            self.excluded[self.sites[node]] = exclusion("unreachable" if node in again.due else "timeout")

    def _checked(self, site: str, request: RoundRequest, answer: Update | str, check: Check) -> Update | None:
        if isinstance(answer, str):
            self.excluded[site] = exclusion(answer)
            return None
        try:
            check_belongs(request, answer)
            check(request, answer)
        except QuorateError as error:
            self.excluded[site] = exclusion(error.code, str(error))
            return None
        self.good += 1
        return answer


class _Reasks:
    """Which nodes are to be asked again, and when.

    Args:
        until: after this moment nobody is asked again (`time.monotonic`).
    """

    def __init__(self, until: float) -> None:
        self._until = until
        self._delays: dict[int, float] = {}
        self.due: dict[int, float] = {}

    def plan(self, node: int) -> bool:
        """Ask this node again later; returns whether there is time for that."""
        delay = self._delays.get(node, _FIRST_REASK)
        if time.monotonic() + delay > self._until:
            return False
        self._delays[node] = min(2 * delay, _LONGEST_REASK)
        self.due[node] = time.monotonic() + delay
        log.info("node %d could not be reached; asking it again in %.0f s", node, delay)
        return True

    def ready(self) -> list[int]:
        """Return the nodes whose time has come, and forget them."""
        ready = [node for node, moment in self.due.items() if moment <= time.monotonic()]
        for node in ready:
            del self.due[node]
        return ready


def in_order(
    order: Sequence[str], answers: Answers, arriving: Iterator[tuple[str, Update]]
) -> Iterator[tuple[str, Update]]:
    """Yield `arriving` in the order of sites: floating-point sums depend on it, and who is first is chance.

    Holds an answer only while a site before it may still answer; a rule that streams thus holds all but one
    at worst.
    """
    early: dict[str, Update] = {}
    waiting = list(order)
    for site, update in arriving:
        early[site] = update
        while waiting and (waiting[0] in early or waiting[0] in answers.excluded):
            if (first := waiting.pop(0)) in early:
                yield first, early.pop(first)
    for site in waiting:
        if site in early:
            yield site, early[site]
