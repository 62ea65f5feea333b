"""Updates are added up as they come, and in the order of sites: what is in memory, and what comes of it."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from tampered import Shuffled

from quorate.client.site.engine import Engine
from quorate.client.site.site import Site
from quorate.server.rounds.loop import run_rounds
from quorate.server.rounds.run import RECORD_FILE, Run
from quorate.shared.aggregation.fedex import FactorStack
from quorate.shared.aggregation.rule import MeanAccumulator
from quorate.shared.protocol.messages import Update
from quorate.simulations import runner
from quorate.simulations.in_process_grid import InProcessGrid

COHORT, STACK = 12, 3
SIZES = {f"site-{index:02}": 4 + index for index in range(COHORT)}


class Counting(InProcessGrid):
    """Counts replies that nobody has let go of."""

    def __init__(self, engine: Engine, sites: Any) -> None:
        super().__init__(engine, sites)
        self.replies: list[weakref.ref[Message]] = []
        self.before = 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.before = len(self.replies)
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        self.replies += map(weakref.ref, replies)
        return replies


def alive(of: list[weakref.ref[Any]]) -> int:
    return sum(each() is not None for each in of)


def test_no_more_than_a_stack_of_updates_is_held_while_a_cohort_is_added_up(
    make_run: Any, make_sites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the moment they are trained: at most a stack, besides the one that is being added."""
    made: list[weakref.ref[Update]] = []
    added: list[int] = []
    most = {"updates": 0, "replies": 0, "to be added": 0}
    real_init, real_add = Update.__init__, MeanAccumulator.add

    def look() -> None:
        trained = [each for each in made if (update := each()) is None or update.header.phase == "fit"]
        most["updates"] = max(most["updates"], alive(trained))
        most["replies"] = max(most["replies"], alive(grid.replies))

    def init(self: Update, *arguments: Any) -> None:
        real_init(self, *arguments)
        if self.header.phase == "fit":
            made.append(weakref.ref(self))
            look()

    def add(self: MeanAccumulator, site: str, update: Any, weight: float) -> None:
        added.append(len(grid.replies) - grid.before)
        look()
        real_add(self, site, update, weight)

    site = Site(make_sites(**SIZES))
    # The screen holds the first half of a round's norms; it is left out.
    federation = {"rounds": 1, "max_norm_ratio": None, "max_weight_share": None}
    config = make_run(training={"max_stack": STACK, "max_steps": 1}, federation=federation)
    run = Run.open(site.prepare(config), tmp_path / "out")
    grid = Counting(site, site.names)
    monkeypatch.setattr(Update, "__init__", init)
    monkeypatch.setattr(MeanAccumulator, "add", add)
    run_rounds(grid, run)
    assert added == [STACK * (index // STACK + 1) for index in range(COHORT)], "added between two stacks"
    assert most["updates"] <= STACK + 1 and most["replies"] <= STACK + 1, most


RULES = {"fedavg": MeanAccumulator, "fedex": FactorStack}
"""A linear one, and one whose arrays hold each site's factors in turn."""


def figures(folder: Path) -> Any:
    """A run's record, as it lies on disk, without what a clock decides."""

    def without_time(value: Any) -> Any:
        if isinstance(value, dict):
            timed = ("seconds", "bytes_up", "run_id")
            return {name: without_time(each) for name, each in value.items() if name not in timed}
        return [without_time(each) for each in value] if isinstance(value, list) else value

    lines = (folder / RECORD_FILE).read_text().splitlines()
    return [json.dumps(without_time(json.loads(line))) for line in lines]


@pytest.mark.parametrize("rule", RULES)
def test_a_run_ends_in_the_same_bits_whatever_order_answers_arrive_in(
    rule: str, make_run: Any, make_sites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in float64 hide most of it once they are rounded, so it is looked at who was added when, too."""
    config = make_run(
        aggregation={"name": rule}, training={"max_stack": 2, "max_steps": 1}, federation={"rounds": 2}
    )
    sites = make_sites(**dict(list(SIZES.items())[:5]))
    kind = RULES[rule]
    orders: dict[str, list[str]] = {}
    real = kind.add
    for grid in (InProcessGrid, Shuffled):
        added = orders.setdefault(grid.__name__, [])

        def add(self: Any, site: str, update: Any, weight: float, added: list[str] = added) -> None:
            added.append(site)
            real(self, site, update, weight)

        monkeypatch.setattr(kind, "add", add)
        monkeypatch.setattr(runner, "InProcessGrid", grid)
        runner.simulate(config, sites, tmp_path / grid.__name__)
    assert orders["InProcessGrid"] == orders["Shuffled"] == 2 * list(sites)
    ours, theirs = (tmp_path / grid.__name__ for grid in (InProcessGrid, Shuffled))
    for name in ("adapter/adapter_model.safetensors", "checkpoint-2/state.safetensors", "metrics.jsonl"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert figures(ours) == figures(theirs)
