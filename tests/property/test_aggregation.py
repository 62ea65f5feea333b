"""Aggregation over random shapes, ranks, weights and cohort sizes."""

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from quorate.shared.adapters.adapter import LORA_A, LORA_B, Adapter
from quorate.shared.aggregation import RULES, Aggregator, GlobalState, Reptile
from quorate.shared.aggregation.fedex import compress, residual_factors
from quorate.shared.aggregation.rule import RESIDUAL_A, RESIDUAL_B

Matrix = npt.NDArray[np.float64]
LAYER = "base_model.model.encoder.query"
HEAD = "base_model.model.classifier.weight"
sizes = st.integers(1, 12)
seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([1e-6, 1e-2, 1.0, 1e3])
rules = st.sampled_from([rule() for rule in RULES])
cohorts = st.lists(st.integers(1, 100_000), min_size=1, max_size=6)

fast = settings(max_examples=60)


def cohort(
    rule: Aggregator, m: int, n: int, r: int, weights: list[int], scale: float, seed: int
) -> tuple[GlobalState, list[tuple[float, Adapter]]]:
    """A state and what the sites of one round upload."""
    rng = np.random.default_rng(seed)
    shapes = {LAYER + LORA_A: (r, n), LAYER + LORA_B: (m, r), HEAD: (2, m)}

    def draw() -> Adapter:
        return Adapter({k: (scale * rng.normal(size=s)).astype(np.float32) for k, s in shapes.items()})

    state = GlobalState(draw())
    frozen = shapes.keys() - rule.trainable(shapes, 1)
    held = [draw().updated({name: state.adapter[name] for name in frozen}) for _ in weights]
    return state, [(float(w), rule.upload(a, state, 1)) for w, a in zip(weights, held, strict=True)]


def finish(rule: Aggregator, state: GlobalState, updates: list[tuple[float, Adapter]]) -> GlobalState:
    accumulator = rule.init(state, 1)
    for weight, update in updates:
        accumulator.add("site", update, weight)
    return accumulator.finish()[0]


def product(state: GlobalState) -> Matrix:
    arrays = {name: array.astype(np.float64) for name, array in state.stored().items()}
    total: Matrix = arrays[LAYER + LORA_B] @ arrays[LAYER + LORA_A]
    if LAYER + RESIDUAL_B in arrays:
        total = total + arrays[LAYER + RESIDUAL_B] @ arrays[LAYER + RESIDUAL_A]
    return total


def assert_same(one: GlobalState, other: GlobalState, scale: float) -> None:
    """Equal up to float32 rounding at the size of the factors (products are of size scale**2)."""
    np.testing.assert_allclose(one.adapter[HEAD], other.adapter[HEAD], rtol=1e-6, atol=1e-6 * scale)
    np.testing.assert_allclose(product(one), product(other), rtol=0, atol=1e-4 * scale**2)


@fast
@given(rules, sizes, sizes, st.integers(1, 4), cohorts, scales, seeds, st.randoms(use_true_random=False))
def test_order_of_sites(rule, m, n, r, weights, scale, seed, random) -> None:
    state, updates = cohort(rule, m, n, r, weights, scale, seed)
    shuffled = random.sample(updates, len(updates))
    assert_same(finish(rule, state, updates), finish(rule, state, shuffled), scale)


@fast
@given(rules, sizes, sizes, st.integers(1, 4), cohorts, scales, seeds, st.floats(0.05, 0.95))
def test_a_site_in_two_parts(rule, m, n, r, weights, scale, seed, part) -> None:
    state, updates = cohort(rule, m, n, r, weights, scale, seed)
    weight, update = updates[0]
    parted = [(part * weight, update), *updates[1:], ((1 - part) * weight, update)]
    assert_same(finish(rule, state, updates), finish(rule, state, parted), scale)


@fast
@given(rules, sizes, sizes, st.integers(1, 4), cohorts, scales, seeds)
def test_plain_arrays_stay_within_the_range_of_the_sites(rule, m, n, r, weights, scale, seed) -> None:
    state, updates = cohort(rule, m, n, r, weights, scale, seed)
    mean = finish(rule, state, updates).adapter[HEAD]
    heads = np.stack([update[HEAD] for _, update in updates])
    if isinstance(rule, Reptile):  # on the way from where it was
        heads = np.concatenate([heads, state.adapter[HEAD][None]])
    assert (heads.min(axis=0) <= mean).all()
    assert (mean <= heads.max(axis=0)).all()


@fast
@given(sizes, sizes, st.integers(1, 4), cohorts, scales, seeds, st.integers(0, 6))
def test_fedex_is_exact_and_of_bounded_rank(m, n, r, weights, scale, seed, old_rank) -> None:
    rng = np.random.default_rng(seed)
    shares = np.array(weights) / sum(weights)
    pairs = [(float(p), scale * rng.normal(size=(m, r)), scale * rng.normal(size=(r, n))) for p in shares]
    old = (scale * rng.normal(size=(m, old_rank)), scale * rng.normal(size=(old_rank, n)))
    left, right = residual_factors(pairs, old)
    mean_b, mean_a = sum(p * b for p, b, _ in pairs), sum(p * a for p, _, a in pairs)
    exact = old[0] @ old[1] + sum(p * b @ a for p, b, a in pairs)
    np.testing.assert_allclose(mean_b @ mean_a + left @ right, exact, rtol=0, atol=1e-11 * scale**2)
    assert left.shape[1] == right.shape[0] <= min(m, n, old_rank + (len(weights) - 1) * r)


@fast
@given(sizes, sizes, st.integers(0, 20), st.integers(0, 20), scales, seeds)
def test_compress_finds_the_rank_and_keeps_the_product(m, n, rank, extra, scale, seed) -> None:
    """A stack with `extra` redundant columns loses just those."""
    rng = np.random.default_rng(seed)
    left, right = scale * rng.normal(size=(m, rank)), scale * rng.normal(size=(rank, n))
    mixing = rng.normal(size=(rank, extra))
    wide_left = np.hstack([left, left @ mixing])
    wide_right = np.vstack([right, np.zeros((extra, n))])
    new_left, new_right = compress(wide_left, wide_right)
    assert new_left.shape[1] == new_right.shape[0] <= min(m, n, rank)
    np.testing.assert_allclose(new_left @ new_right, left @ right, rtol=0, atol=1e-10 * scale**2)
