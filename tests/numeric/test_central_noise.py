"""The sum of clipped updates and the noise on it: bounds and identities that the privacy claim rests on."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quorate.server.privacy.clipped_sum import ClippedSum, next_norm
from quorate.shared.adapters.adapter import LORA_A, LORA_B, Adapter
from quorate.shared.aggregation import RULES, Aggregator, GlobalState
from quorate.shared.privacy.secure_random import secret_source

LAYER, HEAD = "base_model.model.encoder.query", "base_model.model.classifier.weight"
SHAPES = {LAYER + LORA_A: (3, 5), LAYER + LORA_B: (7, 3), HEAD: (2, 7)}
LINEAR = [rule(weighting="uniform") for rule in RULES if rule.linear]

fast = settings(max_examples=60)
norms = st.sampled_from([1e-3, 1.0, 40.0])
scales = st.lists(st.sampled_from([0.0, 1e-4, 1.0, 1e3, 1e30, math.nan]), min_size=1, max_size=6)


def draw(seed: int, scale: float = 1.0, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Adapter:
    rng = np.random.default_rng(seed)
    return Adapter(
        {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}
    )


def moved(start: Adapter, seed: int, scale: float) -> Adapter:
    step = draw(seed, scale)
    return start.map(lambda name, array: array + step[name])


def total(start: Adapter, updates: list[Adapter], norm: float) -> ClippedSum:
    clipped = ClippedSum(start, start, norm)
    for update in updates:
        clipped.add(update)
    return clipped


def flat(clipped: ClippedSum) -> np.ndarray:
    return np.concatenate([array.ravel() for array in clipped.sums.values()])


@fast
@given(st.integers(0, 2**32 - 1), scales, norms)
def test_one_site_moves_the_sum_by_the_norm_at_most_and_the_count_by_a_half(
    seed: int, sizes: list[float], norm: float
) -> None:
    start = draw(seed)
    updates = [moved(start, seed + index + 1, size) for index, size in enumerate(sizes)]
    whole = total(start, updates, norm)
    assert np.isfinite(flat(whole)).all()
    for left_out in range(len(updates)):
        rest = total(start, updates[:left_out] + updates[left_out + 1 :], norm)
        assert np.linalg.norm(flat(whole) - flat(rest)) <= norm * (1 + 1e-9)
        assert abs(whole.within - rest.within) <= 0.5


@fast
@given(st.integers(0, 2**32 - 1), scales, norms)
def test_streaming_equals_clipping_all_at_once(seed: int, sizes: list[float], norm: float) -> None:
    start = draw(seed)
    updates = [moved(start, seed + index + 1, size) for index, size in enumerate(sizes)]
    rows = np.stack(
        [np.concatenate([(u[n].astype(np.float64) - start[n]).ravel() for n in start]) for u in updates]
    )
    rows = rows[np.isfinite(rows).all(axis=1)]
    lengths = np.linalg.norm(rows, axis=1)
    factors = np.minimum(1, norm / np.where(lengths == 0, 1, lengths))
    whole = total(start, updates, norm)
    np.testing.assert_allclose(
        flat(whole), (factors[:, None] * rows).sum(axis=0), rtol=1e-9, atol=1e-12 * norm
    )
    assert whole.within == np.where(lengths <= norm, 0.5, -0.5).sum()


@pytest.mark.parametrize("rule", LINEAR, ids=lambda rule: rule.name)
def test_without_noise_and_clipping_the_rule_does_what_it_always_does(rule: Aggregator) -> None:
    state = GlobalState(draw(0))
    updates = [rule.upload(moved(state.adapter, seed, 0.3), state, 1) for seed in range(1, 8)]
    plain, private = rule.init(state, 1), rule.init(state, 1)
    clipped = ClippedSum(state.adapter, rule.upload_schema(SHAPES, 1), 1e9)
    for update in updates:
        plain.add("site", update, 1.0)
        clipped.add(update)
    private.add("site", clipped.noised_mean(0.0, len(updates), secret_source(False)), 1.0)
    expected, found = plain.finish()[0], private.finish()[0]
    assert found.adapter.schema == expected.adapter.schema
    for name, array in expected.adapter.items():
        np.testing.assert_allclose(found.adapter[name], array, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("secure", [False, True])
def test_the_noise_has_the_deviation_it_is_said_to_have(secure: bool) -> None:
    start = draw(0, shapes={HEAD: (200, 500)})
    clipped = ClippedSum(start, start, 0.25)
    mean = clipped.noised_mean(1.6, 8, secret_source(secure))
    noise = (mean[HEAD].astype(np.float64) - start[HEAD]) * 8
    # 100,000 draws: the deviation is known to .22 %, the mean to 1/316 of it. Nobody can seed them.
    assert noise.std() == pytest.approx(1.6 * 0.25, rel=0.015)
    assert abs(noise.mean()) < 6 * 1.6 * 0.25 / math.sqrt(noise.size)
    fractions = [clipped.noised_fraction(3.0, 20, secret_source(secure)) for _ in range(4000)]
    assert np.std(fractions) == pytest.approx(3.0 / 20, rel=0.07)
    assert np.mean(fractions) == pytest.approx(0.5, abs=0.015)


def test_an_empty_cohort_gives_the_start_and_noise() -> None:
    start = draw(0)
    mean = ClippedSum(start, start, 1.0).noised_mean(0.0, 10, secret_source(False))
    assert mean.content_hash == start.content_hash


def test_arrays_that_do_not_move_get_no_noise() -> None:
    start = draw(0)
    mean = ClippedSum(start, [HEAD], 1.0).noised_mean(1.0, 10, secret_source(False))
    assert list(mean) == [HEAD]


def test_an_update_with_nan_or_infinity_adds_nothing() -> None:
    start = draw(0)
    clipped = total(start, [moved(start, 1, 1.0)], 1.0)
    before, within = flat(clipped), clipped.within
    for bad in (math.nan, math.inf):
        clipped.add(start.map(lambda name, array, bad=bad: np.full_like(array, bad)))
    assert np.array_equal(flat(clipped), before) and clipped.within == within


def test_memory_is_that_of_one_update_whatever_the_cohort() -> None:
    shapes = {HEAD: (200, 1000)}
    start = draw(0, shapes=shapes)
    updates = [draw(seed, shapes=shapes) for seed in range(40)]
    tracemalloc.start()
    total(start, updates, 1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 8 * 200_000, "a sum, a difference and a scaled one in float64, not 40"


@pytest.mark.parametrize("first", [0.1, 10.0])
def test_the_clipping_norm_converges_to_the_quantile_of_the_norms(first: float) -> None:
    """With norms around 1, from below and from above: a turned sign would run away."""
    rng = np.random.default_rng(5)
    source = secret_source(False)
    start, norm, seen = Adapter({HEAD: np.zeros((1, 4), np.float32)}), first, []
    for _ in range(200):
        clipped = ClippedSum(start, start, norm)
        for length in rng.lognormal(0.0, 0.3, 100):
            way = rng.normal(size=(1, 4))
            clipped.add(Adapter({HEAD: (length * way / np.linalg.norm(way)).astype(np.float32)}))
        norm = next_norm(norm, clipped.noised_fraction(5.0, 100, source), 0.5)
        seen.append(norm)
    assert np.mean(seen[100:]) == pytest.approx(1.0, rel=0.1)  # the median of that distribution


def test_the_clipping_norm_takes_the_step_of_the_paper() -> None:
    assert next_norm(2.0, 0.9, 0.5) == pytest.approx(2.0 * math.exp(-0.2 * 0.4))
    assert next_norm(2.0, 0.5, 0.5) == 2.0


@pytest.mark.parametrize("secure", [False, True])
def test_no_two_sources_draw_the_same(secure: bool) -> None:
    draws = {float(secret_source(secure).normal(1)[0]) for _ in range(100)}
    assert len(draws) == 100
