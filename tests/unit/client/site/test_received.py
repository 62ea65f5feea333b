"""What a site accepts of a coordinator: what the run's rule sends, and nothing more."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from site_folder import SITE, request, sha256_of, write_folder

from quorate.client.policy.gate import Gate
from quorate.client.site.engine import OneAtATime
from quorate.client.site.request import Request
from quorate.client.site.request_checks import check_header
from quorate.client.site.site import Site
from quorate.client.site.site_data import SiteData
from quorate.server.exchange.exclusions import REASONS
from quorate.shared.adapters.adapter import LORA_A, LORA_B, Adapter, is_lora_a, lora_layers
from quorate.shared.adapters.selection import downloaded
from quorate.shared.aggregation import GlobalState
from quorate.shared.aggregation.rule import RESIDUAL_A, RESIDUAL_B
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ProtocolError
from quorate.shared.model.lora_model import LoadedModel
from quorate.shared.protocol.messages import RoundRequest, Update

REFUSED = {"adapter", "non-finite", "protocol", "policy-base", "model"}
Arrays = dict[str, np.ndarray]


class Held:
    """A site's folder, the site that answers for it, and the base model in its memory.

    Args:
        path: of the folder.
        model: base model.
        make_run: builds runs of it.
        policy: of site.yaml.
    """

    def __init__(self, path: Path, model: Path, make_run: Any, **policy: Any) -> None:
        self.folder = write_folder(path, model, **policy)
        self.site = Site(SiteData(self.folder), received=path / "received")
        self.gate = Gate(self.folder.config, path, OneAtATime(self.site))
        self._pinned = {"model_name_or_path": "/nowhere", "sha256": sha256_of(model)}
        self._make_run = make_run

    def run(self, **sections: Any) -> RunConfig:
        run: RunConfig = self._make_run(model=self._pinned, **sections)
        return run

    def ask(self, request: RoundRequest) -> Update:
        return self.gate.handle(Request.read(request))

    def joined(self, run: RunConfig) -> Adapter:
        update = self.ask(request(run, "join", 0))
        assert update.header.error is None
        return self.ask(request(run, "start", 0)).arrays

    @property
    def model(self) -> LoadedModel:
        resident = self.site._prepared.resident
        assert resident is not None
        return resident.model

    @property
    def base_hash(self) -> str:
        """Of every frozen weight."""
        digest = hashlib.sha256()
        for name, parameter in self.model.peft.named_parameters():
            if ".lora_" not in name and ".modules_to_save." not in name:
                digest.update(name.encode() + parameter.detach().numpy().tobytes())
        return digest.hexdigest()


@pytest.fixture
def held(tmp_path: Path, tiny_bert: Path, make_run: Any) -> Held:
    return Held(tmp_path, tiny_bert, make_run)


def moved_base(start: Adapter, layer: str, rank: int, size: float, sent: Adapter | None = None) -> Adapter:
    """The attack: factors that move the layer's weight by `size`, beside what is sent otherwise."""
    (d_out, _), (_, d_in) = start[layer + LORA_B].shape, start[layer + LORA_A].shape
    left, right = np.ones((d_out, rank), np.float32), np.ones((rank, d_in), np.float32)
    pair = {layer + RESIDUAL_B: left * np.float32(size / rank), layer + RESIDUAL_A: right}
    return (start if sent is None else sent).updated(pair)


@pytest.mark.parametrize("rule", ["fedavg", "ffa", "reptile"])
@pytest.mark.parametrize("phase", ["fit", "evaluate"])
def test_a_coordinator_cannot_rewrite_the_base_under_a_rule_that_leaves_it_alone(
    rule: str, phase: str, held: Held
) -> None:
    run = held.run(aggregation={"name": rule})
    start = held.joined(run)
    before, layer = held.base_hash, lora_layers(start)[0]
    attack = moved_base(start, layer, 32, 10.0, downloaded(run, GlobalState(start), 1))
    assert held.ask(request(run, phase, 1, attack)).header.error == "adapter"
    assert held.base_hash == before and "adapter" in REASONS


def test_fedex_may_move_the_base_as_far_as_the_site_says(
    tmp_path: Path, tiny_bert: Path, make_run: Any
) -> None:
    held = Held(tmp_path, tiny_bert, make_run, max_base_change=0.25, max_residual_rank=6)
    run = held.run(aggregation={"name": "fedex"})
    start = held.joined(run)
    layer = lora_layers(start)[0]
    right = moved_base(start, layer, 1, 1.0)
    one = held.model.base_change(layer, right[layer + RESIDUAL_B], right[layer + RESIDUAL_A])
    within, beyond = (moved_base(start, layer, 6, share / one) for share in (0.24, 0.26))
    before = held.base_hash
    assert held.ask(request(run, "evaluate", 1, beyond)).header.error == "policy-base"
    assert held.ask(request(run, "evaluate", 1, moved_base(start, layer, 7, 1e-6))).header.error == (
        "policy-base"
    )
    assert held.base_hash == before
    assert held.ask(request(run, "evaluate", 1, within)).header.error is None
    assert held.base_hash != before, "and this one is put into the base"
    assert held.ask(request(run, "evaluate", 1, start)).header.error is None
    assert held.base_hash == before, "from the untouched weight each time"
    assert "policy-base" in REASONS


def test_what_a_base_change_is(held: Held) -> None:
    start = held.joined(held.run(aggregation={"name": "fedex"}))
    layer, draw = lora_layers(start)[0], np.random.default_rng(0)
    left, right = (draw.normal(size=s).astype(np.float32) for s in ((32, 5), (5, 32)))
    module = held.model.peft.get_submodule(layer)
    weight = module.get_base_layer().weight.detach().double().numpy()  # type: ignore[operator, union-attr]
    product = left.astype(np.float64) @ right * module.scaling["default"]  # type: ignore[index, operator]
    expected = np.linalg.norm(product) / np.linalg.norm(weight)
    assert held.model.base_change(layer, left, right) == pytest.approx(expected, rel=1e-6)
    huge = held.model.base_change(layer, left * np.float32(1e37), right * np.float32(1e37))
    assert huge == np.inf, "the product that would be added is not finite"


def test_factors_that_cancel_in_exact_numbers_alone_are_seen(
    tmp_path: Path, tiny_bert: Path, make_run: Any
) -> None:
    held = Held(tmp_path, tiny_bert, make_run)
    run = held.run(aggregation={"name": "fedex"})
    start = held.joined(run)
    layer, draw = lora_layers(start)[0], np.random.default_rng(1)
    x, y = draw.normal(size=(32, 1)), draw.normal(size=(1, 32))
    big, ones = np.full((32, 1), 2.0**24), np.full((1, 32), 2.0**24)
    left = np.hstack([big, -x, -big, x]).astype(np.float32)  # of rank 4, and 0 in exact numbers
    right = np.vstack([ones, y, ones, y]).astype(np.float32)
    assert (left[:, :2] == -left[:, 2:]).all() and (right[:2] == right[2:]).all()
    added = np.linalg.norm((torch.from_numpy(left) @ torch.from_numpy(right)).double().numpy())
    sent = start.updated({layer + RESIDUAL_B: left, layer + RESIDUAL_A: right})
    before = held.base_hash
    answer = held.ask(request(run, "evaluate", 1, sent))
    assert added > 1, "what float32 makes of it"
    assert answer.header.error == "policy-base" and held.base_hash == before


def test_very_many_arrays_are_refused_at_once(held: Held) -> None:
    run = held.run()
    start = held.joined(run)
    many = {f"{number}{RESIDUAL_A}": np.ones((1, 1), np.float32) for number in range(4000)}
    assert held.ask(request(run, "fit", 1, start.updated(many))).header.error == "adapter"


def test_no_base_changes_before_a_round_was_aggregated(held: Held) -> None:
    run = held.run(aggregation={"name": "fedex"})
    start = held.joined(run)
    sent = moved_base(start, lora_layers(start)[0], 4, 1e-4)
    assert held.ask(request(run, "fit", 1, sent)).header.error == "adapter"
    assert held.ask(request(run, "fit", 2, sent)).header.error is None


def test_a_residual_has_no_higher_rank_than_the_rounds_give(held: Held) -> None:
    run = held.run(aggregation={"name": "fedex"}, federation={"rounds": 3, "sites_per_round": 3, "quorum": 1})
    start = held.joined(run)
    layer, r = lora_layers(start)[0], run.adapter.r
    for rank, error in ((2 * r, None), (2 * r + 1, "adapter")):
        assert (
            held.ask(request(run, "evaluate", 1, moved_base(start, layer, rank, 1e-4))).header.error == error
        )


@pytest.mark.parametrize("phase", ["join", "start", "statistics", "alone"])
def test_nothing_comes_with_a_request_that_begins_from_the_start(phase: str, held: Held) -> None:
    run = held.run(adapter={"head": {"init": "analytic"}})
    start = held.joined(run)
    assert held.ask(request(run, phase, 0, start)).header.error == "adapter"


@pytest.mark.parametrize(
    ("phase", "fields"),
    [
        ("fit", {"round": 0}),
        ("fit", {"round": 4}),
        ("fit", {"split": "test"}),
        ("evaluate", {"round": 0, "split": "test"}),
        ("evaluate", {"round": 4, "split": "test"}),
        ("evaluate", {"split": None}),
        ("evaluate", {"split": "train"}),
        ("join", {"round": 1}),
        ("statistics", {"round": 0}),
        ("statistics", {"round": 1}),
        ("alone", {"round": 1}),
        ("finish", {}),
        ("finish", {"round": 0}),
        ("fit", {"delivery": {"rounds": 1, "best_round": 1, "metric": "loss"}}),
    ],
)
def test_a_request_has_the_parts_of_its_phase_and_no_others(phase: str, fields: Any, make_run: Any) -> None:
    run = make_run(federation={"rounds": 3})
    with pytest.raises(ProtocolError):
        check_header(Request.read(request(run, phase, **{"round": 1, **fields})))


ATTACKS = st.lists(
    st.sampled_from(
        ["extra", "renamed", "reshaped", "oversized", "residual", "half-residual", "frozen", "infinite"]
    ),
    min_size=1,
    max_size=3,
)


def attacked(arrays: Arrays, kinds: list[str], draw: random.Random, start: Adapter) -> Arrays:
    """Change what a rule sends in ways of an attacker; every one of them leaves something to refuse."""
    arrays = dict(arrays)
    numbers = np.random.default_rng(draw.randrange(2**32))

    def normal(*shape: int) -> np.ndarray:
        return numbers.normal(size=shape).astype(np.float32)

    for kind in kinds:
        name = draw.choice(sorted(arrays))
        layer = draw.choice(lora_layers(start))
        if kind == "extra":
            stray = draw.choice([f"{layer}.base_layer.weight", "x", "", name + "x", f"{layer}.lora_C.weight"])
            arrays[stray] = normal(*draw.choice([(1,), (32, 32), (4, 32), ()]))
        elif kind == "renamed":
            arrays[draw.choice([name.upper(), name + " ", f"a{RESIDUAL_A}", name[:-1]])] = arrays.pop(name)
        elif kind == "reshaped":
            shape = arrays[name].shape
            arrays[name] = normal(*draw.choice([(*shape, 1), tuple(d + 1 for d in shape), (), (0,)]))
        elif kind == "oversized":
            arrays[name] = normal(*draw.choice([(400, 1000), (50, 50, 50), (10**6,)]))
        elif kind == "residual":
            rank = draw.choice([1, 4, 32, 33, 100])
            arrays |= {layer + RESIDUAL_B: normal(32, rank), layer + RESIDUAL_A: normal(rank, 32)}
        elif kind == "half-residual":
            arrays[layer + draw.choice([RESIDUAL_A, RESIDUAL_B])] = normal(4, 32)
        elif kind == "frozen":  # an array that the rule never sends
            arrays[f"{layer}.lora_A.default.weight"] = normal(4, 32)
        else:
            arrays[name] = np.full(arrays[name].shape, draw.choice([np.nan, np.inf, -np.inf]), np.float32)
    return arrays


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rule=st.sampled_from(["fedavg", "ffa", "reptile", "fedex"]),
    phase=st.sampled_from(["fit", "evaluate", "finish"]),
    kinds=ATTACKS,
    seed=st.integers(0, 2**32 - 1),
)
def test_whatever_else_is_sent_changes_nothing(
    rule: str, phase: str, kinds: list[str], seed: int, held: Held
) -> None:
    run = held.run(aggregation={"name": rule})
    if held.site._prepared.resident is None or held.site._prepared.resident.run != run:
        held.joined(run)
    model = held.model
    start = model.initial
    model.set_residual(Adapter({}))
    before = held.base_hash
    honest = downloaded(run, GlobalState(start), 1)
    sent = Adapter(attacked(dict(honest), kinds, random.Random(seed), start))
    fields: dict[str, Any] = {}
    if phase == "finish":
        fields["delivery"] = {"rounds": 1, "best_round": 1, "metric": "loss"}
    answer = held.ask(request(run, phase, 1, sent, run_id=f"{seed:016x}", **fields))
    assert answer.header.error in REFUSED
    assert not answer.arrays and held.base_hash == before
    assert not (held.folder.path / "received" / f"{seed:016x}").exists()
    assert answer.header.site == SITE


def test_ffa_takes_no_first_factor(held: Held) -> None:
    run = held.run(aggregation={"name": "ffa"})
    start = held.joined(run)
    sent = downloaded(run, GlobalState(start), 1)
    assert not any(map(is_lora_a, sent)) and held.ask(request(run, "fit", 1, sent)).header.error is None
    assert held.ask(request(run, "fit", 1, start)).header.error == "adapter"
