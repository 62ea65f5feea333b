"""Which sites are known to be away, from one exchange of a run to the next.

A site that lets an exchange pass without an answer costs that exchange its grace. After that (after the
second in a row, where the run can do without the first) it is known to be away: it is asked again, and nobody
waits for it until it shows itself. It does so by an answer, be it a late one to an earlier question, or by
its node's return to Flower's list.

A site that hangs is not sent every question of the run: it would have to work all of them off, one after the
other and too late. While one is open, the next follows after a pause that doubles.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from quorate.server.exchange.flower_messages import UNREACHABLE, Open

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 30.0, 600.0
"""Seconds before a site that is silent is asked once more; doubled each time."""
_LIST_SECONDS = 5.0
"""How often Flower is asked for its list of nodes while somebody is away [s]."""


@dataclass
class Presence:
    """Who is away.

    Args:
        away: node -> since when it was asked without an answer (`time.monotonic`).
    """

    away: dict[int, float] = field(default_factory=dict)
    _open: Open = field(default_factory=Open)
    _unlisted: set[int] = field(default_factory=set)
    _pauses: dict[int, tuple[float, float]] = field(default_factory=dict)
    _listed_at: float = -_LIST_SECONDS

    def look(self, grid: Grid) -> set[int]:
        """Return the nodes that have shown themselves since the last look; they are no longer away."""
        if not self.away:
            return set()
        back = {node for node, content in self._open.pull(grid) if content != UNREACHABLE}
        now = time.monotonic()
        if now - self._listed_at >= _LIST_SECONDS:
            self._listed_at = now
            listed = set(grid.get_node_ids())
            back |= {node for node in self.away if node in listed and node in self._unlisted}
            self._unlisted = {node for node in self.away if node not in listed}
        back &= self.away.keys()
        for node in back:
            log.info("node %d shows itself again", node)
            self.heard(node)
        return back

    def to_ask(self, node: int) -> bool:
        """Whether to send this node a question now."""
        waiting = node in self.away and node in self._open.values()
        return not waiting or time.monotonic() >= self._pauses[node][0]

    def heard(self, node: int) -> None:
        """Take note that a node answers."""
        self.away.pop(node, None)
        self._pauses.pop(node, None)
        self._unlisted.discard(node)
        self._open.forget(node)

    def at_work(self, nodes: Set[int], grid: Grid) -> set[int]:
        """Return those of these silent nodes that may be at work: listed by Flower, and silent for once.

        A node that lets two exchanges in a row pass is away.
        """
        if not nodes:
            return set()
        before = self.away.keys() | set(self._open.values())
        return (set(nodes) - before) & set(grid.get_node_ids())

    def missed(self, asked: Mapping[int, float], left: Mapping[str, int], *, listed: bool = True) -> None:
        """Take note of nodes that let an exchange pass.

        Args:
            asked: node -> when it was asked.
            left: id of a message to them that is still open -> node.
            listed: whether Flower's list had them.
        """
        now = time.monotonic()
        for node, since in asked.items():
            self.away.setdefault(node, since)
            if node in left.values() or node not in self._pauses:
                _, pause = self._pauses.get(node, (0.0, FIRST_PAUSE / 2))
                pause = min(2 * pause, LONGEST_PAUSE)
                self._pauses[node] = (now + pause, pause)
        self._open.update(left)
        self._unlisted |= set() if listed else set(asked)
        self._listed_at = -_LIST_SECONDS

    def present(self, nodes: Iterable[int]) -> set[int]:
        """Return those of `nodes` that are not known to be away."""
        return {node for node in nodes if node not in self.away}
