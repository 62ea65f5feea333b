"""What lives in tests alone of engines: one that callers of `Engine` are held to, and ways to ask them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from unittest.mock import patch

from flwr.app import Context, Message, RecordDict

from quorate.client.process import flower_app
from quorate.client.site.data_source import SiteRows
from quorate.client.site.engine import Engine, in_stacks
from quorate.client.site.request import Request
from quorate.client.site.site import Site
from quorate.shared.aggregation import GlobalState
from quorate.shared.config.run_config import RunConfig
from quorate.shared.protocol.messages import RoundRequest, Update
from quorate.simulations.in_process_grid import RUN_ID, InProcessGrid


def answer_all(engine: Engine, messages: Iterable[RoundRequest]) -> list[Update]:
    return [update for stack in in_stacks(engine, messages) for update in stack]


class ClientAppGrid(InProcessGrid):
    """Every message goes through the ClientApp, one by one, as in production."""

    def _answered(self, waiting: Iterator[Message]) -> list[Message]:
        return [self._through(message) for message in islice(waiting, 1)]

    def _through(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        context = Context(RUN_ID, node, {"site": self._sites[node]}, RecordDict(), {})
        with patch.object(flower_app, "RemoteSite", Connected(self._engine, self._sites[node])):
            return flower_app.app(message, context)


class Connected:
    """One site of an engine in the place of a site process."""

    def __init__(self, engine: Engine, site: str) -> None:
        self.engine, self.site = engine, site

    def from_environment(self) -> Connected:
        return self

    def __enter__(self) -> Connected:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, message: bytes, timeout: float | None = None) -> bytes:
        asked = RoundRequest.decode(message).addressed_to(self.site)
        (update,) = answer_all(self.engine, [asked])
        return update.encoded


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
