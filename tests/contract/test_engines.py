"""One suite for everything that is an `Engine`: the resident site, and one of two devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import TwoSites, answer_all
from tampered import Shuffled

from quorate.client.site.engine import Engine, OneAtATime, in_stacks
from quorate.client.site.request import Request
from quorate.client.site.site import Site
from quorate.server.exchange.join import request
from quorate.server.rounds.loop import run_rounds
from quorate.server.rounds.run import Run
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.errors import DataError
from quorate.shared.protocol.messages import RoundRequest
from quorate.shared.protocol.phases import Phase
from quorate.simulations.in_process_grid import InProcessGrid

SIZES = {"east": 9, "north": 12, "south": 7, "west": 4}
ENGINES = {"site": Site, "two-sites": TwoSites}


@pytest.fixture(params=ENGINES.values(), ids=ENGINES)
def engine(request: pytest.FixtureRequest, make_sites: Any) -> Any:
    return request.param(make_sites(**SIZES))


@pytest.fixture
def run(engine: Engine, make_run: Any, tmp_path: Path) -> Run:
    return Run.open(engine.prepare(make_run(training={"max_stack": 3})), tmp_path / "out")


@pytest.fixture
def start(engine: Engine, run: Run) -> Adapter:
    (answer,) = answer_all(engine, [request(run, 0, "start", "east")])
    return answer.arrays


def asked(run: Run, phase: Phase, site: str, *more: Any) -> Request:
    return Request.read(request(run, 0 if phase == "join" else 1, phase, site, *more))


def test_a_run_is_prepared_with_its_models_hash(run: Run) -> None:
    assert run.config.model.sha256 is not None


def test_what_cannot_be_trained_on_shows_before_round_1(
    engine: Engine, make_run: Any, make_sites: Any
) -> None:
    broken = type(engine)({**make_sites(north=9), "south": {"train": []}})
    with pytest.raises(DataError):
        broken.prepare(make_run())


def test_answers_are_in_the_order_of_requests_whatever_their_phases(
    engine: Engine, run: Run, start: Adapter
) -> None:
    requests = [
        asked(run, "fit", "west", start),
        asked(run, "evaluate", "north", start, "test"),
        asked(run, "fit", "east", start),
        asked(run, "join", "south"),
        asked(run, "fit", "north", start),
    ]
    answers = engine.handle_many(requests)
    assert [each.header.error for each in answers] == [None] * 5
    for question, found in zip(requests, answers, strict=True):
        assert (found.header.phase, found.header.site) == (question.header.phase, question.header.site)
        assert found.header.input_hash == question.arrays.content_hash
    assert [each.header.num_examples for each in answers] == [4, answers[1].header.outcomes.rows, 9, 0, 12]
    assert engine.handle_many([]) == []


def test_a_site_that_fails_is_a_code_and_changes_no_other(engine: Engine, run: Run, start: Adapter) -> None:
    broken = start.map(lambda _, array: np.full_like(array, np.nan))
    requests = [asked(run, "fit", name, broken if name == "north" else start) for name in engine.names]
    requests.append(asked(run, "fit", "nowhere", start))
    answers = engine.handle_many(requests)
    assert [each.header.error for each in answers] == [None, "non-finite", None, None, "refused"]
    assert not answers[1].arrays and not answers[4].arrays
    for name, found in zip(engine.names, answers, strict=False):
        if found.header.error is None:
            alone = OneAtATime(engine).handle(asked(run, "fit", name, start))
            assert found.arrays.minus(alone.arrays).l2_norm < 1e-5


def test_a_message_that_cannot_be_read_costs_the_others_nothing(
    engine: Engine, run: Run, start: Adapter
) -> None:
    honest = [request(run, 1, "fit", name, start) for name in engine.names]
    forged = honest[1].header.model_copy(update={"config_hash": "0" * 64})
    messages = [honest[0], RoundRequest(forged, start), *honest[2:]]
    assert [each.header.error for each in answer_all(engine, messages)] == [None, "protocol", None, None]


def test_messages_are_taken_a_stack_at_a_time(engine: Engine, run: Run, start: Adapter) -> None:
    taken: list[str] = []

    def messages() -> Any:
        for name in engine.names:
            taken.append(name)
            yield request(run, 1, "fit", name, start)

    stacks = in_stacks(engine, messages())
    assert [each.header.site for each in next(stacks)] == taken == ["east", "north", "south"]
    assert [each.header.site for each in next(stacks)] == ["west"]


@pytest.mark.parametrize("grid", [InProcessGrid, Shuffled])
def test_a_run_ends_where_it_ends_on_one_device(
    engine: Engine, run: Run, make_run: Any, make_sites: Any, tmp_path: Path, grid: type[InProcessGrid]
) -> None:
    # SGD: over several rounds AdamW magnifies the last bit of a gradient near 0 to a whole step.
    config = make_run(training={"optim": "sgd", "learning_rate": 0.1, "max_stack": 3})
    states = []
    for each in (engine, Site(make_sites(**SIZES))):
        opened = Run.open(each.prepare(config), tmp_path / type(each).__name__ / str(len(states)))
        states.append(run_rounds(grid(each, each.names), opened).state.adapter)
    assert states[0].minus(states[1]).l2_norm < 1e-5
