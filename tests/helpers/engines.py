"""An engine that lives in tests alone: what callers of `Engine` are held to besides the resident site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quorate.client.site.data_source import SiteRows
from quorate.client.site.request import Request
from quorate.client.site.site import Site
from quorate.shared.aggregation import GlobalState
from quorate.shared.config.run_config import RunConfig
from quorate.shared.protocol.messages import Update


class TwoSites:
    """Every other site is on one device, the rest on another: each has a base model of its own."""

    def __init__(self, rows: Mapping[str, SiteRows]) -> None:
        self.names = tuple(rows)
        self._parts = [Site({name: rows[name] for name in self.names[start::2]}) for start in (0, 1)]

    def prepare(self, run: RunConfig) -> RunConfig:
        first, second = (part.prepare(run) for part in self._parts)
        assert first == second
        return first

    def handle_many(self, requests: Sequence[Request]) -> list[Update]:
        answers: dict[int, Update] = {}
        for index, part in enumerate(self._parts):
            mine = [i for i, each in enumerate(requests) if self._part_of(each) == index]
            answers.update(zip(mine, part.handle_many([requests[i] for i in mine]), strict=True))
        return [answers[index] for index in range(len(requests))]

    def samples(self, run: RunConfig, states: Sequence[GlobalState]) -> list[list[tuple[str, str]]]:
        return self._parts[0].samples(run, states)

    def _part_of(self, request: Request) -> int:
        return self.names.index(request.header.site) % 2 if request.header.site in self.names else 0
