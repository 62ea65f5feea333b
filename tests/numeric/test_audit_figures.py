"""The arithmetic of audits: published figures, other people's code and plain integrals agree with ours."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from dp_accounting import get_epsilon_gaussian
from scipy import integrate
from scipy.stats import binom, norm

from quorate.shared.privacy.audit import one_shot
from quorate.shared.privacy.audit.membership_inference import LOW_FPR, attack, auc, rmia
from quorate.shared.privacy.audit.one_run import Guesses, guess, lower_bound, p_value
from quorate.shared.privacy.audit.one_shot import (
    canaries,
    chance_of_cosine,
    cosines,
    epsilon_of_gaussians,
    estimate,
    hockey_stick,
)


def test_published_bounds_of_one_run() -> None:
    all_right, most = Guesses(canaries=1000, made=500, right=500), Guesses(canaries=1000, made=500, right=400)
    assert lower_bound(all_right, 1e-5, 0.95) == pytest.approx(5.09, abs=0.005)
    assert lower_bound(most, 1e-5, 0.95) == pytest.approx(1.20, abs=0.005)


def test_a_p_value_is_the_definition() -> None:
    guesses, epsilon, delta = Guesses(canaries=60, made=30, right=24), 0.7, 1e-3
    q = np.exp(epsilon) / (1 + np.exp(epsilon))
    chances = [float(binom.pmf(k, 30, q)) for k in range(31)]
    worst = max(sum(chances[24 - i : 24]) / i for i in range(1, 25))
    assert p_value(guesses, epsilon, delta) == pytest.approx(sum(chances[24:]) + 2 * 60 * delta * worst)


def test_a_bound_grows_with_right_guesses_and_falls_with_confidence() -> None:
    bounds = [lower_bound(Guesses(canaries=200, made=100, right=v), 1e-5, 0.95) for v in range(40, 101, 5)]
    assert bounds == sorted(bounds) and bounds[0] == 0.0 < bounds[-1]
    guesses = Guesses(canaries=200, made=100, right=90)
    assert lower_bound(guesses, 1e-5, 0.999) < lower_bound(guesses, 1e-5, 0.95)
    assert lower_bound(guesses, 1e-3, 0.95) < lower_bound(guesses, 1e-5, 0.95)


def test_randomised_response_is_seldom_refuted() -> None:
    """The mechanism that meets epsilon exactly is refuted as often as the confidence allows, and no more."""
    epsilon, runs, confidence = 1.0, 400, 0.9
    drawn = np.random.default_rng(0)
    rights = drawn.binomial(300, np.exp(epsilon) / (1 + np.exp(epsilon)), runs)
    refuted = sum(
        lower_bound(Guesses(canaries=300, made=300, right=int(v)), 0.0, confidence) > epsilon for v in rights
    )
    assert 0 < refuted <= binom.ppf(0.999, runs, 1 - confidence)


@pytest.mark.parametrize("made", [0, 1, 7, 10])
def test_guesses_go_by_the_extremes(made: int) -> None:
    included = np.array([True] * 5 + [False] * 5)
    perfect = guess(included.astype(float) + np.linspace(0, 0.1, 10), included, made)
    assert perfect == Guesses(canaries=10, made=made, right=made)
    assert guess(-included.astype(float), included, made).right == 0


def test_impossible_guesses_are_refused() -> None:
    with pytest.raises(ValueError) as caught:
        lower_bound(Guesses(canaries=10, made=11, right=3), 0.0, 0.95)
    assert all(figure in str(caught.value) for figure in ("3", "11", "10"))
    with pytest.raises(ValueError) as caught:
        guess(np.zeros(10), np.zeros(10, dtype=bool), 11)
    assert all(figure in str(caught.value) for figure in ("11", "10"))


@pytest.mark.parametrize(
    ("p", "q"),
    [((0.3, 1.2), (0.0, 1.0)), ((0.3, 0.8), (0.0, 1.0)), ((0.0, 1.0), (0.3, 0.8)), ((2.0, 1.0), (0.0, 1.0))],
)
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.7, 3.0])
def test_the_hockey_stick_is_its_integral(
    p: tuple[float, float], q: tuple[float, float], epsilon: float
) -> None:
    def positive(x: float) -> float:
        return float(max(0.0, norm.pdf(x, *p) - np.exp(epsilon) * norm.pdf(x, *q)))

    points = np.linspace(-14, 14, 29)
    whole = sum(integrate.quad(positive, a, b)[0] for a, b in pairwise(points))
    assert hockey_stick(epsilon, p, q) == pytest.approx(whole, abs=1e-7)


@pytest.mark.parametrize("noise_multiplier", [0.25, 0.5, 1.0, 3.0, 20.0])
def test_equal_deviations_are_the_gaussian_mechanism(noise_multiplier: float) -> None:
    ours = epsilon_of_gaussians(1 / noise_multiplier, 1.0, 1.0, 1e-5)
    assert ours == pytest.approx(get_epsilon_gaussian(noise_multiplier, 1e-5), rel=1e-4, abs=1e-5)


def test_one_shot_finds_the_epsilon_of_the_gaussian_mechanism() -> None:
    """1,000 canary sites, each in the sum once, at noise that allows epsilon 4.38."""
    size, count, noise_multiplier = 20_000, 1000, 1.0
    drawn = np.random.default_rng(0)
    directions = canaries(count, size, drawn)
    released = directions.sum(axis=0) + noise_multiplier * drawn.standard_normal(size)
    # Beside its own noise a canary hides behind the other 999, which the estimate counts as noise too.
    hidden = np.sqrt(noise_multiplier**2 + count / size)
    found = estimate(cosines(directions, released), size, 1e-5)
    assert found == pytest.approx(get_epsilon_gaussian(hidden, 1e-5), rel=0.15)
    fresh = canaries(count, size, drawn)
    assert estimate(cosines(fresh, released), size, 1e-5) < 0.5


@pytest.mark.parametrize(("size", "least"), [(2, 0.3), (3, -0.4), (40, 0.2), (611, 0.05), (611, -0.01)])
def test_the_chance_of_a_cosine_is_that_of_random_directions(size: int, least: float) -> None:
    drawn = canaries(20_000, size, np.random.default_rng(0))
    assert np.mean(drawn[:, 0] >= least) == pytest.approx(chance_of_cosine(least, size), abs=0.01)


def test_a_median_cosine_refutes_what_its_definition_says() -> None:
    """2 (e^epsilon S(t) + delta) at the bound is what confidence leaves."""
    observed = np.array([0.1, 0.16, 0.18, 0.3, 0.4])
    found = one_shot.lower_bound(observed, 1000, 1e-5, 0.99)
    error = 2 * (np.exp(found) * chance_of_cosine(0.18, 1000) + 1e-5)
    assert found > 5 and error == pytest.approx(0.01)
    assert one_shot.lower_bound(observed, 1000, 0.006, 0.99) == 0.0, "delta alone explains it"
    assert one_shot.lower_bound(observed / 10, 1000, 1e-5, 0.99) == 0.0
    assert one_shot.lower_bound(np.full(5, 0.999), 10**6, 1e-5, 0.999) == 200.0


def test_the_gaussian_mechanism_is_not_refuted_by_its_canaries() -> None:
    """A canary alone in the sum, in many runs: refuted no oftener than the confidence says."""
    drawn, size, noise_multiplier, runs = np.random.default_rng(0), 400, 0.6, 400
    epsilon = get_epsilon_gaussian(noise_multiplier, 1e-5)
    refuted = 0
    for _ in range(runs):
        (direction,) = canaries(1, size, drawn)
        released = direction + noise_multiplier * drawn.standard_normal(size)
        found = one_shot.lower_bound(cosines(direction[None], released), size, 1e-5, 0.9)
        refuted += found > epsilon
    assert refuted <= binom.ppf(0.999, runs, 0.1)


def test_membership_figures_of_known_scores() -> None:
    drawn = np.random.default_rng(0)
    members, others = drawn.normal(1.0, 1.0, 4000), drawn.normal(0.0, 1.0, 4000)
    found = attack(members, others, samples=200)
    assert found.auc == pytest.approx(norm.cdf(1 / np.sqrt(2)), abs=0.015)
    assert found.tpr_at_low_fpr == pytest.approx(norm.sf(norm.isf(LOW_FPR) - 1), abs=0.03)
    assert found.auc_interval[0] < found.auc < found.auc_interval[1]
    assert found.tpr_interval[0] < found.tpr_at_low_fpr < found.tpr_interval[1]
    guessing = attack(others[:2000], others[2000:], samples=200)
    assert guessing.auc_interval[0] < 0.5 < guessing.auc_interval[1]


def test_the_area_is_the_share_of_pairs_in_order() -> None:
    drawn = np.random.default_rng(1)
    members, others = drawn.integers(0, 5, 23).astype(float), drawn.integers(0, 5, 31).astype(float)
    pairs = [(m > o) + 0.5 * (m == o) for m in members for o in others]
    assert auc(members, others) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("score", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_refused(score: float) -> None:
    with pytest.raises(ValueError) as caught:
        attack(np.array([0.0, score]), np.zeros(3))
    assert "score" in str(caught.value)
    with pytest.raises(ValueError) as caught:
        attack(np.array([]), np.zeros(3))
    assert "rows" in str(caught.value)


def test_rmia_undoes_the_difficulty_of_a_row() -> None:
    """Hard and easy rows: likelihood alone mixes them up, the ratio to reference models does not."""
    drawn = np.random.default_rng(0)
    n = 600
    difficulty = drawn.uniform(-4, -0.5, 2 * n)
    references = difficulty + drawn.normal(0, 0.05, (2, 2 * n))
    gain = np.r_[np.full(n, 0.3), np.zeros(n)]  # members fit better than the references say
    target = np.minimum(difficulty + gain + drawn.normal(0, 0.05, 2 * n), 0.0)
    population = drawn.uniform(-4, -0.5, 300)
    scores = rmia(target, references, population, population + drawn.normal(0, 0.05, (2, 300)))
    assert auc(target[:n], target[n:]) < 0.65 < 0.8 < auc(scores[:n], scores[n:])
