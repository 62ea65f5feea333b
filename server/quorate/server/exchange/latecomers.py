"""Sites that did not answer in time when a run began: they are asked again, and join between two rounds."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from flwr.serverapp import Grid

from quorate.server.exchange.exclusions import TRANSIENT, exclusion
from quorate.server.exchange.flower_messages import Exchange, decode
from quorate.server.exchange.join import APPROVAL, Members, identity, join_check, request
from quorate.server.exchange.presence import FIRST_PAUSE, LONGEST_PAUSE
from quorate.server.rounds.run import Run
from quorate.server.rounds.update_checks import check_belongs
from quorate.shared.errors import ProtocolError, QuorateError
from quorate.shared.protocol.messages import RoundRequest, Update

log = logging.getLogger(__name__)

_NOT_YET = (*TRANSIENT, APPROVAL, "expired", "device-lost")
"""Answers of sites that may still join."""


_NOW = 0.0, FIRST_PAUSE / 2


class Latecomers:
    """Asks them, without waiting; those that do not join are asked again after a pause that doubles.

    Not with client-level privacy: its noise was settled for the sites that there were.

    Args:
        members: `late` names them; whoever joins becomes one of the others.
        names: node id -> site, as in `join`.
    """

    def __init__(self, grid: Grid, run: Run, members: Members, names: Mapping[int, str] | None) -> None:
        self._grid = grid
        self._run = run
        self._members = members
        self._exchange = Exchange(grid, run.config.federation.timeout_seconds)
        self._check = join_check(run)
        self._due: dict[int, tuple[float, float]] = {}
        self._requests: dict[int, RoundRequest] = {}
        if not run.config.private_clients:
            self._requests = {
                node: request(run, 0, "join", names[node] if names else "") for node in members.late
            }

    def take(self, round: int) -> None:
        """Let those join, from `round` on, whose answers have come; ask those that have shown themselves."""
        if not self._members.late or not self._requests:
            return
        for node, content in self._exchange.pull():
            answer = decode(content)
            if answer not in TRANSIENT:
                self._exchange.settle(node)
                self._members.presence.heard(node)
            if isinstance(answer, str) and answer in _NOT_YET:
                self._members.refused[self._members.late[node]] = exclusion(answer)
            elif node in self._members.late:
                self._admit(node, answer, round)
        back = self._members.presence.look(self._grid)
        listed = set(self._grid.get_node_ids())
        now = time.monotonic()
        due = {}
        for node in self._members.late.keys() & listed:
            moment, pause = (now, FIRST_PAUSE / 2) if node in back else self._due.get(node, _NOW)
            if now >= moment:
                due[node] = self._requests[node]
                pause = min(2 * pause, LONGEST_PAUSE)
                self._due[node] = now + pause, pause
        self._exchange.send(due)

    def _admit(self, node: int, answer: Update | str, round: int) -> None:
        members = self._members
        known = members.late.pop(node)
        members.refused.pop(known, None)
        try:
            if isinstance(answer, str):
                members.refused[known] = exclusion(answer)
                return
            check_belongs(self._requests[node], answer)
            self._check(self._requests[node], answer)
            site, description = answer.header.site, answer.header.description
            assert description is not None  # join_check
            if site in members.nodes:
                raise ProtocolError("joined late under a name that another site has.")
        except QuorateError as error:
            members.refused[known] = exclusion(error.code, str(error))
            return
        if identity(answer) != members.identity:
            members.refused[site] = exclusion("model", "holds another base model than most sites")
            return
        members.nodes[site], members.sites[site] = node, description
        log.warning("%s has answered at last, and takes part from round %d on", site, round)
