"""Steps 2 to 4 of a round: ask sites, wait for a quorum and a grace period, check what comes back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from flwr.serverapp import Grid

from quorate.server.exchange.exclusions import TRANSIENT, exclusion
from quorate.server.exchange.flower_messages import POLL_SECONDS, UNREACHABLE, Exchange, decode
from quorate.server.exchange.patience import Patience, Reasks
from quorate.server.exchange.presence import Presence
from quorate.server.rounds.update_checks import check_belongs
from quorate.server.tracking.records import Exclusion
from quorate.shared.errors import QuorateError
from quorate.shared.protocol.messages import RoundRequest, Update

T = TypeVar("T")
Check = Callable[[RoundRequest, Update], T]
"""Raises where an answer does not count, and returns what is handed on of it."""


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
        exchange = OpenExchange(self, grid, requests, check)
        while not exchange.over:
            yield from exchange.arrived()
            # Only between two looks at the grid: what has arrived counts, however long it takes to add up,
            # and a grid in this process answers nobody before the next look.
            if exchange.quiet and exchange.tend():
                time.sleep(POLL_SECONDS)
        exchange.close()


class OpenExchange(Generic[T]):
    """An exchange under way. It may be looked at now and then, and outlive the round that began it.

    Sends the requests when it is made; `arrived` never waits, `tend` belongs between two looks, `close` to
    the end.

    Args:
        answers: its account.
        grid: carries messages; several exchanges may be open on it.
        requests: node -> request.
        check: says of an answer whether it counts.
    """

    def __init__(
        self, answers: Answers, grid: Grid, requests: Mapping[int, RoundRequest], check: Check[T]
    ) -> None:
        self._answers, self._grid, self._requests, self._check = answers, grid, requests, check
        self._started = time.monotonic()
        answers.presence.look(grid)
        self._away = requests.keys() - answers.presence.present(requests)
        self._messages = Exchange(grid, answers.timeout)
        self._reasks = Reasks(self._started + min(answers.reask, answers.timeout))
        self._patience = Patience(answers, self._started, len(requests))
        self._missing, self._lost = set(requests), set[int]()
        self._ended = False
        self.quiet = True
        """Whether the last look found nothing."""
        self._send(node for node in requests if answers.presence.to_ask(node))

    @property
    def over(self) -> bool:
        """Whether nothing more is waited for."""
        return self._ended or not self._missing

    @property
    def missing(self) -> set[str]:
        """The sites that have not answered."""
        return {self._answers.sites[node] for node in self._missing}

    def arrived(self) -> Iterator[tuple[str, T]]:
        """Yield (site, what `check` returned) for each good answer that is there now."""
        answers, sites = self._answers, self._answers.sites
        self.quiet = True
        for node, content in self._messages.pull():
            self.quiet = False
            if content in TRANSIENT and self._reasks.plan(node):
                continue
            self._messages.settle(node)
            self._missing.discard(node)
            answers.heard += 1
            self._lost |= {node} if content in TRANSIENT else set()
            if node not in self._lost:
                answers.presence.heard(node)
            answers.bytes_up[sites[node]] = len(content) if isinstance(content, bytes) else 0
            checked = self._checked(sites[node], self._requests[node], decode(content))
            if checked is not None:
                answers.longest = time.monotonic() - self._started
                yield sites[node], checked

    def tend(self) -> bool:
        """Ask again who is silent, say who is waited for; returns whether to wait on."""
        if self.over:
            return False
        answers, presence = self._answers, self._answers.presence
        silent = self._missing - self._messages.waiting - self._reasks.due.keys()
        self._send(self._reasks.ready(self._missing) | (presence.look(self._grid) & silent))
        present = presence.present(self._missing)
        if self._patience.over(bool(present)):
            self._ended = True
            return False
        if not present:  # they are needed all the same
            self._send(silent)
        since = {answers.sites[node]: presence.away.get(node, self._started) for node in self._missing}
        self._patience.tell(since)
        return True

    def close(self) -> None:
        """Note why those that are missing do not count, and wait for no answer any more."""
        answers, missing = self._answers, set(self._missing)
        for node in missing:
            code = UNREACHABLE if node in self._reasks.due else "away" if node in self._away else "timeout"
            answers.excluded[answers.sites[node]] = exclusion(code)
        left = self._messages.leave()
        if answers.optional and not self._patience.at_end:
            missing -= answers.presence.at_work(missing & set(left.values()), self._grid)
        answers.presence.missed(dict.fromkeys(missing | self._lost, self._started), left)

    def _send(self, nodes: Iterable[int]) -> None:
        asked = {node: self._requests[node] for node in nodes}
        self._messages.send(asked)
        for node, request in asked.items():
            self._reasks.sent(node)
            site, down = self._answers.sites[node], self._answers.bytes_down
            down[site] = down.get(site, 0) + len(request.encoded)

    def _checked(self, site: str, request: RoundRequest, answer: Update | str) -> T | None:
        answers = self._answers
        if isinstance(answer, str):
            answers.excluded[site] = exclusion(answer)
            return None
        try:
            check_belongs(request, answer)
            checked = self._check(request, answer)
        except QuorateError as error:
            answers.excluded[site] = exclusion(error.code, str(error))
            return None
        answers.good += 1
        return checked


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
