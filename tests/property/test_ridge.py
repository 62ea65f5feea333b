"""A head solved from sums is the ridge regression on all rows together, whoever holds which of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from closed_form import by_least_squares
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refuses

from quorate.shared.errors import AdapterError, ProtocolError
from quorate.shared.metrics.head_sums import SUMMED, HeadSums, sums_schema
from quorate.shared.metrics.ridge import STRENGTH, STRENGTHS, solve, solve_best, squared_error

TOLERANCE = 1e-8
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


def make_rows(seed: int, count: int, features: int = 6, outputs: int = 3) -> Rows:
    """Features with a mean and scales of their own, one-hot targets and uneven weights."""
    draw = np.random.default_rng(seed)
    x = draw.normal(0.5, 1, (count, features)) * draw.uniform(0.1, 3, features)
    return x, np.eye(outputs)[draw.integers(0, outputs, count)], draw.uniform(0.2, 2, count)


def summed(parts: list[Any], x: np.ndarray, y: np.ndarray, w: np.ndarray) -> HeadSums:
    total = HeadSums.zeros(x.shape[1], y.shape[1])
    for part in parts:
        total = total + HeadSums.of(x[part], y[part], w[part])
    return total


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(2, 60),
    sites=st.integers(1, 6),
    strength=st.sampled_from(STRENGTHS),
    without=st.booleans(),
)
def test_any_partition_in_any_order_without_any_site_is_the_pooled_ridge(
    seed: int, count: int, sites: int, strength: float, without: bool
) -> None:
    x, y, w = make_rows(seed, count)
    draw = np.random.default_rng(seed + 1)
    home = draw.integers(0, sites, count)
    if without and (home != 0).any():  # a site is missing: exactly its rows are
        x, y, w, home = x[home != 0], y[home != 0], w[home != 0], home[home != 0]
    parts = [np.flatnonzero(home == site) for site in draw.permutation(sites)]
    found = solve(summed(parts, x, y, w), strength)
    np.testing.assert_allclose(found, by_least_squares(x, y, w, strength), rtol=0, atol=TOLERANCE)


def test_it_is_what_scikit_learn_finds() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y, w = make_rows(5, 80)
    sums = summed([slice(0, 7), slice(7, 80)], x, y, w)
    alpha = 1e-2 * float(np.trace(sums.gram)) / len(sums.gram)
    theirs = linear_model.Ridge(alpha=alpha, solver="svd").fit(x, y, sample_weight=w)
    ours = solve(sums, 1e-2)
    np.testing.assert_allclose(ours[:-1].T, theirs.coef_, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(ours[-1], theirs.intercept_, rtol=0, atol=TOLERANCE)


def test_the_error_on_rows_follows_from_their_sums() -> None:
    x, y, w = make_rows(1, 30)
    sums, coefficients = HeadSums.of(x, y, w), np.random.default_rng(2).normal(size=(7, 3))
    said = (w[:, None] * (y - np.hstack([x, np.ones((30, 1))]) @ coefficients) ** 2).sum()
    assert squared_error(sums, coefficients) == pytest.approx(said, rel=1e-10)


def test_validation_rows_pick_the_strength() -> None:
    """Few noisy rows ask for a strong ridge, many exact ones for a weak one."""
    draw = np.random.default_rng(3)
    true = draw.normal(size=(20, 1))
    picked = {}
    for rows, noise in ((25, 20.0), (4000, 0.0)):
        x = draw.normal(size=(rows + 500, 20))
        y = x @ true + draw.normal(0, noise, (rows + 500, 1))
        sums = [
            HeadSums.of(x[part], y[part], np.ones(len(x[part]))) for part in np.split(range(len(x)), [rows])
        ]
        found = solve_best(*sums)
        errors = [squared_error(sums[1], solve(sums[0], strength)) for strength in STRENGTHS]
        assert found.strength == STRENGTHS[int(np.argmin(errors))]
        picked[rows] = found.strength
    assert picked[25] > picked[4000] == STRENGTHS[0]
    assert solve_best(sums[0], HeadSums.zeros(20, 1)).strength == STRENGTH


def test_what_is_sent_is_read_back_and_has_its_schema() -> None:
    sums = {split: HeadSums.of(*make_rows(at, 9)) for at, split in enumerate(SUMMED)}
    arrays = {name: array for split in SUMMED for name, array in sums[split].arrays(split).items()}
    assert {name: array.shape for name, array in arrays.items()} == sums_schema(6, 3)
    assert all(array.dtype == np.float64 for array in arrays.values())
    for split in SUMMED:
        assert np.array_equal(HeadSums.read(arrays, split).cross, sums[split].cross)


@given(st.integers(0, 2**32 - 1), st.integers(0, 40), st.integers(1, 8))
def test_sums_over_any_rows_pass_the_check(seed: int, count: int, features: int) -> None:
    x, y, w = make_rows(seed, count, features)
    HeadSums.of(x, y, w).check(w.sum(), w.sum())
    HeadSums.of(np.repeat(x[:1], count, axis=0), y[:count], w).check(0.2 * count, 2 * count)
    # Targets that features say exactly, and features of which some hardly move.
    fine = 50 + x * np.logspace(0, -6, features)
    HeadSums.of(fine.astype(np.float32), x[:, :1] * 1e3, w).check(w.sum(), w.sum())


def apart(sums: HeadSums) -> HeadSums:
    """With targets along a direction in which features hardly go, each product within its own bound."""
    _, directions = np.linalg.eigh(sums.gram)
    bound = np.outer(np.sqrt(np.diag(sums.gram)), np.sqrt(sums.squares))
    return replace(sums, cross=np.sign(directions[:, :1]) * bound)


def swapped(gram: np.ndarray) -> np.ndarray:
    gram = gram.copy()
    gram[0, 1] += 1e-3
    return gram


def turned(gram: np.ndarray) -> np.ndarray:
    """Positive on the diagonal, and below 0 in a direction."""
    gram = gram.copy()
    gram[0, 1] = gram[1, 0] = 2 * np.sqrt(gram[0, 0] * gram[1, 1])
    return gram


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda s: replace(s, gram=swapped(s.gram)), "sums-not-symmetric"),
        (lambda s: replace(s, gram=2 * s.gram), "sums-of-other-weight"),
        (lambda s: replace(s, gram=-s.gram), "sums-of-other-weight"),
        (lambda s: replace(s, squares=-s.squares), "sums-of-squares"),
        (lambda s: replace(s, squares=s.squares * 1e200), "sums-of-squares"),
        (lambda s: replace(s, squares=np.full(3, 1.7e308)), "sums-of-squares"),
        (lambda s: replace(s, cross=1e3 * s.cross), "sums-with-targets"),
        (lambda s: replace(s, cross=np.nan * s.cross), "sums-with-targets"),
        (apart, "sums-with-targets"),
        (lambda s: replace(s, gram=turned(s.gram)), "sums-of-features"),
    ],
    ids=[
        "asymmetric",
        "weight",
        "negative",
        "squares",
        "huge",
        "overflow",
        "cross",
        "nan",
        "apart",
        "turned",
    ],
)
def test_sums_that_no_rows_have_are_refused(change: Any, kind: str) -> None:
    x, y, _ = make_rows(4, 9)
    sums = HeadSums.of(x, y, np.ones(9))
    sums.check(9, 9)
    with refuses(ProtocolError, kind):
        change(sums).check(9, 9)


def test_rows_without_weight_have_no_solution() -> None:
    with refuses(AdapterError, "rows-without-weight"):
        solve(HeadSums.zeros(4, 2), 0.1)
