"""Identities of the aggregation rules, to float64 rounding where the rule computes in float64."""

import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest

from quorate.shared.adapters.adapter import LORA_A, LORA_B, Adapter
from quorate.shared.aggregation import FFA, FedAvg, FedEx, GlobalState
from quorate.shared.aggregation.fedex import compress, residual_factors
from quorate.shared.aggregation.rule import RESIDUAL_A, RESIDUAL_B, Aggregator, WeightedSum
from quorate.shared.errors import AdapterError

Matrix = npt.NDArray[np.float64]
M, N, R = 24, 17, 3
LAYER = "base_model.model.encoder.query"
OTHER = "base_model.model.encoder.value"
HEAD = "base_model.model.classifier.weight"


def sites(count: int, seed: int = 0, r: int = R) -> list[tuple[float, Matrix, Matrix]]:
    """(share, B [M, r], A [r, N]) of sites with unequal shares, around a common start as in a real round."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(count))
    b, a = rng.normal(size=(M, r)), rng.normal(size=(r, N))
    return [
        (float(p), b + 0.3 * rng.normal(size=b.shape), a + 0.3 * rng.normal(size=a.shape)) for p in shares
    ]


def means(pairs: list[tuple[float, Matrix, Matrix]]) -> tuple[Matrix, Matrix]:
    return sum(p * b for p, b, _ in pairs), sum(p * a for p, _, a in pairs)


def adapter(pair: tuple[float, Matrix, Matrix], layer: str = LAYER, head: float = 0.0) -> Adapter:
    _, b, a = pair
    return Adapter(
        {
            layer + LORA_B: b.astype(np.float32),
            layer + LORA_A: a.astype(np.float32),
            HEAD: np.full((2, M), head, dtype=np.float32),
        }
    )


def run_round(rule: Aggregator, state: GlobalState, updates: list[tuple[float, Adapter]]) -> GlobalState:
    accumulator = rule.init(state, 1)
    for weight, update in updates:
        accumulator.add("site", update, weight)
    return accumulator.finish()[0]


def product(state: GlobalState, layer: str = LAYER) -> Matrix:
    """The layer's B A + residual_B residual_A in float64."""
    arrays = {name: array.astype(np.float64) for name, array in state.stored().items()}
    total = arrays[layer + LORA_B] @ arrays[layer + LORA_A]
    if layer + RESIDUAL_B in arrays:
        total = total + arrays[layer + RESIDUAL_B] @ arrays[layer + RESIDUAL_A]
    return total


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_fedex_closes_the_gap_between_mean_of_products_and_product_of_means(count: int) -> None:
    pairs = sites(count)
    left, right = residual_factors(pairs)
    mean_b, mean_a = means(pairs)
    exact = sum(p * b @ a for p, b, a in pairs)
    np.testing.assert_allclose(
        mean_b @ mean_a + left @ right, exact, rtol=0, atol=1e-13 * np.abs(exact).max()
    )
    assert left.shape[1] == right.shape[0] == min((count - 1) * R, M, N)


def test_fedavg_leaves_that_gap() -> None:
    """The test above would mean nothing if averaging factors were exact anyway."""
    pairs = sites(3)
    result = run_round(
        FedAvg(), GlobalState(adapter(pairs[0])), [(p, adapter((p, b, a))) for p, b, a in pairs]
    )
    assert np.abs(product(result) - sum(p * b @ a for p, b, a in pairs)).max() > 0.05


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_fedex_of_equal_sites_has_no_residual_at_any_scale(size: float) -> None:
    _, b, a = sites(1)[0]
    pairs = [(p, size * b, a) for p, _, _ in sites(7)]
    left, right = residual_factors(pairs)
    assert left.shape == (M, 0)
    assert right.shape == (0, N)


def test_fedex_keeps_a_residual_that_is_small_but_not_noise() -> None:
    """Sites a millionth apart: the residual is 1e-12 of the product, far above float64 rounding."""
    _, b, a = sites(1)[0]
    rng = np.random.default_rng(3)
    pairs = [
        (0.5, b + 1e-6 * rng.normal(size=b.shape), a + 1e-6 * rng.normal(size=a.shape)) for _ in range(2)
    ]
    left, right = residual_factors(pairs)
    expected = sum(p * (bk - means(pairs)[0]) @ (ak - means(pairs)[1]) for p, bk, ak in pairs)
    assert left.shape[1] == R
    np.testing.assert_allclose(left @ right, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def test_fedex_adds_to_the_old_residual_and_never_exceeds_full_rank() -> None:
    old: tuple[Matrix, Matrix] | None = None
    exact = np.zeros((M, N))
    for round in range(5):
        pairs = sites(4, seed=round)
        mean_b, mean_a = means(pairs)
        exact += sum(p * b @ a for p, b, a in pairs) - mean_b @ mean_a
        old = residual_factors(pairs, old)
        assert old[0].shape[1] == min((round + 1) * 3 * R, M, N)
        np.testing.assert_allclose(old[0] @ old[1], exact, rtol=0, atol=1e-12 * np.abs(exact).max())


def test_fedex_rule_carries_the_ideal_model_through_rounds_in_float32() -> None:
    """What the rule ships is float32: sum p_k B_k A_k plus the older residual, to float32 rounding."""
    rule = FedEx()
    state = GlobalState(adapter(sites(1)[0]))
    for round in range(4):
        pairs = sites(3, seed=round)
        before = product(state) - product(GlobalState(state.adapter))
        state = run_round(rule, state, [(100 * p, adapter((p, b, a), head=round)) for p, b, a in pairs])
        ideal = before + sum(p * b @ a for p, b, a in pairs)
        np.testing.assert_allclose(product(state), ideal, rtol=0, atol=1e-6 * np.abs(ideal).max())
        assert state.residual[LAYER + RESIDUAL_A].dtype == np.float32
        assert np.all(state.adapter[HEAD] == round)


def test_fedex_first_round_needs_no_residual_while_a_has_not_moved() -> None:
    """B starts at zero: sites that moved B alone average exactly, so nothing goes into the base."""
    pairs = [(p, b, np.ones((R, N))) for p, b, _ in sites(5)]
    state = run_round(FedEx(), GlobalState(adapter(pairs[0])), [(p, adapter((p, b, a))) for p, b, a in pairs])
    assert len(state.residual) == 0


def test_fedex_leaves_layers_without_a_gap_out_of_the_residual() -> None:
    pairs = sites(3)
    agreed = pairs[0]
    updates = [(p, adapter((p, b, a)).updated(adapter(agreed, OTHER))) for p, b, a in pairs]
    state = run_round(FedEx(), GlobalState(updates[0][1]), updates)
    assert set(state.residual) == {LAYER + RESIDUAL_A, LAYER + RESIDUAL_B}
    kept = run_round(FedEx(), state, [(1.0, updates[0][1])])
    np.testing.assert_allclose(
        kept.residual[LAYER + RESIDUAL_B] @ kept.residual[LAYER + RESIDUAL_A],
        state.residual[LAYER + RESIDUAL_B] @ state.residual[LAYER + RESIDUAL_A],
        atol=1e-6,
    )


def test_ffa_is_exact_because_a_is_one_for_all() -> None:
    shared_a = sites(1)[0][2]
    pairs = [(p, b, shared_a) for p, b, _ in sites(4)]
    rule = FFA()
    state = GlobalState(adapter(pairs[0]))
    updates = [(p, rule.upload(adapter((p, b, a)), state, 1)) for p, b, a in pairs]
    assert set(updates[0][1]) == {LAYER + LORA_B, HEAD}
    result = run_round(rule, state, updates)
    exact = sum(p * b @ a for p, b, a in pairs)
    np.testing.assert_allclose(product(result), exact, rtol=0, atol=1e-6 * np.abs(exact).max())
    assert set(rule.download(result, 2)) == {LAYER + LORA_B, HEAD}


@pytest.mark.parametrize("rule", [FedAvg(), FFA()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("weight", [1.0, 3.0, 12345.0, 0.1])
def test_linear_rules_return_one_site_and_equal_sites_bit_for_bit(rule: Aggregator, weight: float) -> None:
    state = GlobalState(adapter(sites(1, seed=1)[0]))
    update = rule.upload(adapter(sites(1)[0], head=0.1), state, 1)
    for cohort in (1, 3):
        result = run_round(rule, state, [(weight * (k + 1), update) for k in range(cohort)])
        assert result.adapter.content_hash == state.adapter.updated(update).content_hash


def test_order_and_halving_of_sites_in_float64() -> None:
    updates = [(float(w), adapter((0.0, b, a), head=w)) for w, (_, b, a) in enumerate(sites(6), start=1)]
    halved = [(weight / 2, update) for weight, update in updates for _ in range(2)]
    means64 = []
    for order in (updates, updates[::-1], halved):
        total = WeightedSum()
        for weight, update in order:
            total.add(update, weight)
        means64.append({name: array / total.weight for name, array in total.arrays.items()})
    for other in means64[1:]:
        for name, array in means64[0].items():
            np.testing.assert_allclose(other[name], array, rtol=0, atol=1e-14 * np.abs(array).max())


def test_compress_keeps_product_and_singular_values() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(M, 40)), rng.normal(size=(40, N))
    new_left, new_right = compress(left, right)
    assert new_left.shape == (M, N)
    np.testing.assert_allclose(new_left @ new_right, left @ right, rtol=0, atol=1e-12)
    values = np.linalg.svd(left @ right, compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(new_left, axis=0) ** 2, values, rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(new_right, axis=1) ** 2, values, rtol=1e-12)


def test_compress_forms_nothing_of_the_size_of_the_layer() -> None:
    """A layer of 20,000 x 30,000 would be 4.8 GB; its factors of rank 6 are 2.4 MB."""
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(20_000, 6)), rng.normal(size=(6, 30_000))
    tracemalloc.start()
    try:
        compress(left, right)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 * (left.nbytes + right.nbytes)


def test_fedex_refuses_dora_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"magnitude.*use_dora: false"):
        FedEx().check_compatible(use_dora=True)
    FedEx().check_compatible(use_dora=False)
    FedAvg().check_compatible(use_dora=True)


def test_fedex_refuses_a_factor_that_is_not_a_matrix() -> None:
    convolution = Adapter(
        {LAYER + LORA_A: np.ones((2, 3, 3, 3), np.float32), LAYER + LORA_B: np.ones((4, 2, 1, 1), np.float32)}
    )
    with pytest.raises(AdapterError, match=r"encoder\.query is not a linear layer"):
        run_round(FedEx(), GlobalState(convolution), [(1.0, convolution)])
