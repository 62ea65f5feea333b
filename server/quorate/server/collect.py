"""Steps 2 to 4 of a round: ask sites, wait for a quorum and a grace period, check what comes back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from quorate.server.checks import check_belongs
from quorate.server.flower import decode, replies, send
from quorate.server.records import Exclusion
from quorate.shared.errors import QuorateError
from quorate.shared.messages import RoundRequest, Update

Check = Callable[[RoundRequest, Update], None]

REASONS = {
    "timeout": "did not reply in time",
    "unreachable": "could not be reached, or its ClientApp failed; the logs of Flower say why",
    "data": "could not use its own data; its log says why",
    "model": "could not load or adapt the base model; its log says why",
    "refused": "refused the request; its log says which rule",
    "policy-task": "its policy does not allow this task",
    "policy-data": "its policy does not allow this data alias, or it holds no such data",
    "policy-model": "its policy does not list the base model's sha256, or the run does not name it",
    "policy-rank": "its policy allows no adapter of this rank",
    "policy-rows": "has fewer training rows than its policy asks for",
    "policy-approval": "a person at the site must approve this run first (quorate site approve)",
    "other-config": "knows this run id under another run configuration",
    "conflict": "has answered this round from another start",
    "outdated": "has answered a later round of this run",
    "oversized": "got a message above its size limit",
    "expired": "got the request too late, or was not up again in time",
    "protocol": "sent something that is not an answer to the request",
    "non-finite": "sent an update with NaN or infinity, or its training diverged: lower the learning rate",
    "adapter": "sent arrays with other names or shapes than were asked for",
    "norm": "moved further than federation.max_update_norm",
    "config": "worked under another run configuration",
}


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
    """

    sites: Mapping[int, str]
    quorum: int
    timeout: float
    grace: float
    good: int = 0
    excluded: dict[str, Exclusion] = field(default_factory=dict)
    bytes_down: dict[str, int] = field(default_factory=dict)
    bytes_up: dict[str, int] = field(default_factory=dict)

    def ask(
        self, grid: Grid, requests: Mapping[int, RoundRequest], check: Check
    ) -> Iterator[tuple[str, Update]]:
        """Send `requests` (node -> request) and yield (site, update) for each answer that passes `check`.

        Answers are handed on as they arrive, so that a rule that streams never holds two. An answer that
        fails, or does not come, is noted in `excluded` with its reason; the others go on.
        """
        started = time.monotonic()
        sent = send(grid, requests, ttl=self.timeout)
        for node, request in requests.items():
            self.bytes_down[self.sites[node]] = len(request.encoded)
        missing = set(requests)
        enough_since: float | None = None
        for reply in replies(grid, sent, started + self.timeout):
            if reply is not None:
                node, content = reply
                missing.discard(node)
                self.bytes_up[self.sites[node]] = len(content) if isinstance(content, bytes) else 0
                update = self._checked(self.sites[node], requests[node], decode(content), check)
                if update is not None:
                    yield self.sites[node], update
            # Only between two looks at the grid: what has arrived counts, however long it takes to add up.
            elif self.good >= self.quorum:
                enough_since = enough_since or time.monotonic()
                if time.monotonic() - enough_since >= self.grace:
                    break
        for node in missing:
            self.excluded[self.sites[node]] = exclusion("timeout")

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
