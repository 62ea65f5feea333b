"""One round of a run as a value: which sites can be asked what, in which round."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.serverapp import Grid

from quorate.server.exchange.exchange import Answers
from quorate.server.exchange.join import Members, answers_of, request
from quorate.server.rounds.run import Run
from quorate.server.tracking.records import SolvedHead
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.protocol.messages import RoundRequest, Split
from quorate.shared.protocol.phases import Phase


@dataclass(frozen=True)
class Round:
    """A round.

    Args:
        number: from 1.
        head: how the head was solved that round 1 begins from; None for other rounds, and other runs.
    """

    grid: Grid
    run: Run
    members: Members
    number: int
    head: SolvedHead | None = None

    def answers(self, *, quorum: int | None = None, expected: float = 0.0) -> Answers:
        """Return an exchange with all members; see `answers_of`."""
        members = self.members
        return answers_of(self.run, members.by_node, members.presence, quorum=quorum, expected=expected)

    def request(
        self, phase: Phase, site: str, arrays: Adapter, split: Split | None = None
    ) -> tuple[int, RoundRequest]:
        """Return the node of a site, and what it is asked in this round."""
        return self.members.nodes[site], request(self.run, self.number, phase, site, arrays, split)
