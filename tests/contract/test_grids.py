"""One suite for every way a request reaches a site: a stack at once, or a ClientApp per message; and for
answers that arrive in any order.

Also the place that fails loudly when Flower's private names, which the in-process grid uses, move.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from closed_form import ANALYTIC
from engines import ClientAppGrid
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from refusals import refuses
from tampered import Shuffled

from quorate.client.site.engine import Engine
from quorate.client.site.site import Site
from quorate.server.exchange.exchange import Answers, OpenExchange
from quorate.server.exchange.flower_messages import Exchange, decode
from quorate.server.exchange.join import request
from quorate.server.rounds.loop import run_rounds
from quorate.server.rounds.run import RECORD_FILE, Run, read_jsonl
from quorate.server.tracking.records import RoundRecord
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.errors import ProtocolError
from quorate.shared.protocol.messages import RoundRequest, Update
from quorate.simulations.in_process_grid import InProcessGrid

NOTHING = Adapter({})


@pytest.fixture(params=["stacks", "client-app", "shuffled"])
def grid_over(request: pytest.FixtureRequest) -> Any:
    """Build a grid over an engine, with messages handed over in stacks or one by one."""

    def make(engine: Engine) -> InProcessGrid:
        kinds = {"stacks": InProcessGrid, "client-app": ClientAppGrid, "shuffled": Shuffled}
        return kinds[request.param](engine, engine.names)

    return make


@pytest.fixture
def opened(make_run: Any, make_sites: Any, tmp_path: Path) -> tuple[Site, Run]:
    site = Site(make_sites(north=12, south=7, west=4))
    return site, Run.open(site.prepare(make_run()), tmp_path / "out")


def ask(grid: Any, run: Run, requests: dict[int, RoundRequest]) -> dict[int, Any]:
    exchange = Exchange(grid, ttl=60)
    exchange.send(requests)
    return {node: decode(content) for node, content in pull_all(exchange)}


def pull_all(exchange: Exchange) -> list[tuple[int, bytes | str]]:
    """Every reply; a site in this process answers some message at every pull."""
    replies = []
    while exchange.waiting:
        before = len(replies)
        replies += exchange.pull()
        assert len(replies) > before
    return replies


def test_every_site_answers_for_itself(grid_over: Any, opened: Any) -> None:
    site, run = opened
    grid = grid_over(site)
    nodes = list(grid.get_node_ids())
    start = ask(grid, run, {nodes[0]: request(run, 0, "start", "", NOTHING)})[nodes[0]].arrays
    asked = {node: request(run, 1, "fit", name, start) for node, name in zip(nodes, site.names, strict=True)}
    updates = ask(grid, run, asked)
    assert [updates[node].header.site for node in nodes] == list(site.names)
    assert [updates[node].header.num_examples for node in nodes] == [12, 7, 4]
    for node in nodes:
        assert updates[node].arrays.minus(start).l2_norm > 0
        assert updates[node].header.input_hash == start.content_hash


def test_a_failing_site_is_named_by_code_and_the_others_go_on(grid_over: Any, opened: Any) -> None:
    site, run = opened
    grid = grid_over(site)
    nodes = list(grid.get_node_ids())
    start = ask(grid, run, {nodes[0]: request(run, 0, "start", "", NOTHING)})[nodes[0]].arrays
    broken = start.map(lambda _, array: np.full_like(array, np.nan))
    asked = {node: request(run, 1, "fit", name, start) for node, name in zip(nodes, site.names, strict=True)}
    asked[nodes[1]] = request(run, 1, "fit", site.names[1], broken)
    updates = ask(grid, run, asked)
    assert updates[nodes[1]] == "non-finite"
    assert updates[nodes[0]].header.error is None and updates[nodes[2]].header.error is None


def test_a_request_for_another_site_is_refused(grid_over: Any, opened: Any) -> None:
    site, run = opened
    grid = grid_over(site)
    first, second, _ = grid.get_node_ids()
    wrong = request(run, 0, "join", site.names[1], NOTHING)
    if not isinstance(grid, ClientAppGrid):
        with refuses(ProtocolError, "another-site"):
            ask(grid, run, {first: wrong})
    else:
        assert ask(grid, run, {first: wrong})[first] == "protocol"
    assert ask(grid, run, {second: wrong})[second].header.site == site.names[1]


def test_a_configuration_that_does_not_match_its_hash_is_refused(grid_over: Any, opened: Any) -> None:
    site, run = opened
    grid = grid_over(site)
    node = next(iter(grid.get_node_ids()))
    honest = request(run, 0, "join", "", NOTHING)
    forged = honest.header.model_copy(
        update={"run_config": honest.header.run_config.replace('"seed":3', '"seed":4')}
    )
    assert ask(grid, run, {node: RoundRequest(forged)})[node] == "protocol"


def test_a_reply_is_handed_out_once_and_belongs_to_its_message(grid_over: Any, opened: Any) -> None:
    site, run = opened
    grid = grid_over(site)
    exchange = Exchange(grid, ttl=60)
    nodes = list(grid.get_node_ids())
    exchange.send({node: request(run, 0, "join", "", NOTHING) for node in nodes})
    first = [(node, decode(content)) for node, content in pull_all(exchange)]
    answered = [(node, update.header.site) for node, update in first]
    assert sorted(answered) == list(zip(nodes, site.names, strict=True))
    assert (answered == sorted(answered)) == (not isinstance(grid, Shuffled))
    assert not exchange.waiting and list(exchange.pull()) == []


def test_an_exchange_may_outlive_others_on_the_same_grid(opened: Any) -> None:
    site, run = opened

    class Slow(InProcessGrid):
        busy: ClassVar[set[int]] = set()

        def pull_messages(self, message_ids: Any) -> Any:
            return super().pull_messages(
                each for each in message_ids if self._pushed[each].metadata.dst_node_id not in self.busy
            )

    grid = Slow(site, site.names)
    nodes = list(grid.get_node_ids())
    by_node = dict(zip(nodes, site.names, strict=True))
    Slow.busy = {nodes[-1]}

    def asked(of: list[int]) -> dict[int, RoundRequest]:
        return {node: request(run, 0, "join", by_node[node], NOTHING) for node in of}

    def who(_request: RoundRequest, update: Update) -> str:
        return update.header.site

    account, later = (Answers(by_node, quorum=1, timeout=60, grace=60) for _ in range(2))
    long = OpenExchange(account, grid, asked(nodes), who)
    first = {name for name, _ in long.arrived()}
    while not long.quiet:
        first |= {name for name, _ in long.arrived()}
    assert first == {"north", "south"} and long.missing == {"west"} and long.tend()
    assert (
        dict(later.ask(grid, asked(nodes[:2]), lambda _request, update: update.header.site)).keys() == first
    )
    assert list(long.arrived()) == [] and not long.over
    Slow.busy = set()
    assert [name for name, _ in long.arrived()] == ["west"] and long.over
    long.close()
    assert (account.good, later.good, account.excluded) == (3, 2, {})


def test_runs_end_in_the_same_adapter_whichever_way_messages_go(
    make_run: Any, make_sites: Any, tmp_path: Path
) -> None:
    states = []
    # SGD: over several rounds AdamW magnifies the last bit of a gradient near 0 to a whole step.
    config = make_run(training={"optim": "sgd", "learning_rate": 0.1})
    for kind in (InProcessGrid, ClientAppGrid):
        site = Site(make_sites(north=12, south=7, west=4))
        run = Run.open(site.prepare(config), tmp_path / kind.__name__)
        states.append(run_rounds(kind(site, site.names), run).state.adapter)
    assert states[0].minus(states[1]).l2_norm < 1e-5


def test_a_solved_head_is_the_same_whichever_way_messages_go(
    make_run: Any, make_sites: Any, tmp_path: Path
) -> None:
    heads = []
    for kind in (InProcessGrid, ClientAppGrid):
        site = Site(make_sites(north=12, south=7, west=4))
        run = Run.open(site.prepare(make_run(adapter=ANALYTIC)), tmp_path / kind.__name__)
        run_rounds(kind(site, site.names), run)
        (record, _) = read_jsonl(run.output_dir / RECORD_FILE, RoundRecord)
        assert isinstance(record, RoundRecord) and record.head is not None
        heads.append(record.head.model_dump(exclude={"seconds", "bytes_up"}))
        assert set(record.head.rows) == {"north", "south", "west"}
    assert heads[0] == heads[1]


def test_what_is_not_ours_is_set_aside_by_name(opened: Any) -> None:
    """A node that answers rubbish, nothing, or for another round does not stop the others."""
    site, run = opened

    class Faulty(InProcessGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            pulled = list(super().pull_messages(message_ids))
            if len(pulled) < 3:
                return pulled
            record = pulled[0].content.array_records["quorate"]
            record["message"] = Array(dtype="uint8", shape=(4,), stype="safetensors", data=b"oops")
            pulled[1].content = RecordDict({"other": ArrayRecord()})
            return pulled

    grid = Faulty(site, site.names)
    by_node = dict(zip(grid.get_node_ids(), site.names, strict=True))
    answers = Answers(by_node, quorum=3, timeout=5, grace=0)
    asked = {node: request(run, 0, "join", name, NOTHING) for node, name in by_node.items()}
    good = dict(answers.ask(grid, asked, lambda _request, update: update))
    assert list(good) == ["west"]
    assert {site: why.code for site, why in answers.excluded.items()} == {
        "north": "protocol",
        "south": "protocol",
    }


def test_flowers_private_names_are_where_the_grid_expects_them() -> None:
    identity = importlib.import_module("flwr.supercore.task_identity").TaskIdentity
    assert {"task_id", "run_id", "node_id"} <= set(dir(type(identity)))
    run = importlib.import_module("flwr.supercore.run").Run.create_empty(7)
    assert run.run_id == 7
    message = Message(RecordDict(), 5, MessageType.TRAIN)
    assert message.metadata.__dict__["_message_id"] == ""
