"""Reptile: its identities, the paper's update, and that it finds a start from which sites learn faster."""

from __future__ import annotations

import numpy as np
import pytest

from quorate.shared.adapters.adapter import LORA_A, LORA_B, Adapter
from quorate.shared.aggregation import Aggregator, FedAvg, GlobalState, Reptile

SHAPES = {"base_model.model.l" + LORA_A: (2, 5), "base_model.model.l" + LORA_B: (4, 2), "head": (3, 4)}


def draw(seed: int) -> Adapter:
    rng = np.random.default_rng(seed)
    return Adapter({name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()})


def after(
    rule: Aggregator, state: GlobalState, updates: list[tuple[float, Adapter]], round: int = 1
) -> Adapter:
    accumulator = rule.init(state, round)
    for weight, update in updates:
        accumulator.add("site", update, weight)
    return accumulator.finish()[0].adapter


STATE = GlobalState(draw(0))
UPDATES = [(3.0, draw(1)), (5.0, draw(2)), (1.0, draw(3))]


def test_a_rate_of_1_is_fedavg_bit_for_bit() -> None:
    ours = after(Reptile(outer_learning_rate=1), STATE, UPDATES)
    assert ours.content_hash == after(FedAvg(), STATE, UPDATES).content_hash


def test_a_rate_of_0_does_not_move_bit_for_bit() -> None:
    ours = after(Reptile(outer_learning_rate=0), STATE, UPDATES)
    assert ours.content_hash == STATE.adapter.content_hash


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_it_is_the_papers_update(rate: float) -> None:
    ours = after(
        Reptile(outer_learning_rate=rate, weighting="uniform"), STATE, [(1.0, u) for _, u in UPDATES]
    )
    for name, start in STATE.adapter.items():
        mean = sum(u[name].astype(np.float64) - start for _, u in UPDATES) / 3
        np.testing.assert_allclose(ours[name], start + rate * mean, rtol=0, atol=1e-6)


def test_the_rate_falls_linearly_to_0() -> None:
    rule = Reptile(outer_learning_rate=0.8, decay_rounds=4)
    assert [rule.rate(round) for round in range(1, 7)] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0, 0])
    assert [Reptile(outer_learning_rate=0.8).rate(round) for round in (1, 100)] == [0.8, 0.8]
    for round in (2, 5):
        ours = after(rule, STATE, UPDATES, round)
        alike = after(Reptile(outer_learning_rate=rule.rate(round)), STATE, UPDATES)
        assert ours.content_hash == alike.content_hash


def test_two_rounds_with_the_same_mean_close_the_gap_geometrically() -> None:
    rule, state = Reptile(outer_learning_rate=0.25), STATE
    target = UPDATES[0][1]
    for _ in range(8):
        state = GlobalState(after(rule, state, [(1.0, target)]))
    for name in SHAPES:
        left = (1 - 0.25) ** 8 * (STATE.adapter[name] - target[name])
        np.testing.assert_allclose(state.adapter[name] - target[name], left, atol=1e-5)


def test_it_finds_a_start_from_which_new_sites_adapt_faster() -> None:
    """Sites fit lines w x through a common w0 plus their own shift: a new one is learnt in a few steps from
    Reptile's start, far better than from where it began."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=(1, 20))

    def site(seed: int) -> tuple[np.ndarray, np.ndarray]:
        own = np.random.default_rng(seed)
        x = own.normal(size=(40, 20))
        return x, x @ (common + 0.1 * own.normal(size=(1, 20))).T

    def adapted(start: np.ndarray, seed: int) -> tuple[np.ndarray, float]:
        (x, y), w = site(seed), start.astype(np.float64)
        for _ in range(5):
            w = w - 0.05 * (x @ w.T - y).T @ x / len(x)
        return w, float(((x @ w.T - y) ** 2).mean())

    zero = np.zeros((1, 20), dtype=np.float32)
    state, rule = GlobalState(Adapter({"head": zero})), Reptile(outer_learning_rate=0.5, decay_rounds=60)
    for round in range(1, 61):
        updates = [
            (1.0, Adapter({"head": adapted(state.adapter["head"], 10 * round + k)[0].astype(np.float32)}))
            for k in range(4)
        ]
        state = GlobalState(after(rule, state, updates, round))
    for seed in range(10_000, 10_005):
        assert adapted(state.adapter["head"], seed)[1] < 0.1 * adapted(zero, seed)[1]
