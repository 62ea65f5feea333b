"""Epsilon and calibration against other accountants, closed forms and published figures."""

from __future__ import annotations

import logging
import math
import subprocess
import sys

import numpy as np
import pytest
from refusals import refuses
from scipy.stats import norm

from quorate.shared.errors import ConfigError
from quorate.shared.privacy.accounting import (
    FINE,
    check_delta,
    default_delta,
    epsilon,
    grouped,
)
from quorate.shared.privacy.calibration import LEAST_NOISE, calibrate
from quorate.shared.privacy.privacy_event import PrivacyEvent
from quorate.shared.privacy.run_cost import CrossCheck, cross_checked

DELTA = 1e-5


def event(q: float, sigma: float, steps: int) -> PrivacyEvent:
    return PrivacyEvent(sampling_probability=q, noise_multiplier=sigma, steps=steps)


def random_events(count: int) -> list[PrivacyEvent]:
    rng = np.random.default_rng(20261126)
    return [
        event(
            float(10 ** rng.uniform(-3, -0.5)),
            float(10 ** rng.uniform(0, 0.8)),
            int(10 ** rng.uniform(1, 4)),
        )
        for _ in range(count)
    ]


# --- against other accountants and closed forms ---------------------------------------------------------


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(each, marks=pytest.mark.slow if number >= 3 else ())
        for number, each in enumerate(random_events(50))
    ],
    ids=lambda event: f"q={event.sampling_probability:.4f}-z={event.noise_multiplier:.2f}-{event.steps}",
)
def test_it_agrees_with_opacus(event: PrivacyEvent) -> None:
    """Opacus' PRV accountant is another code by other people; it adds .01 for its own error."""
    checked = cross_checked([event], DELTA)
    assert checked.prv is not None
    assert checked.pld == pytest.approx(checked.prv, abs=0.02, rel=0.02)
    assert checked.pld < checked.rdp


@pytest.mark.parametrize("sigma", [0.3, 1.0, 5.0, 40.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_without_sampling_it_is_the_gaussian_mechanism(sigma: float, delta: float) -> None:
    """Balle and Wang 2018, theorem 8, gives delta of epsilon; ours must give that delta back."""
    eps = epsilon([event(1, sigma, 1)], delta)
    back = norm.cdf(0.5 / sigma - eps * sigma) - math.exp(eps) * norm.cdf(-0.5 / sigma - eps * sigma)
    assert back == pytest.approx(delta, rel=1e-6) or (eps == 0 and back <= delta)


def test_sampling_of_nearly_everyone_tends_to_the_gaussian_mechanism() -> None:
    """The grid's figure meets the closed form, also where a ledger holds steps of both kinds."""
    closed = epsilon([event(1, 4, 30)], DELTA)
    assert epsilon([event(1 - 1e-9, 4, 30)], DELTA) == pytest.approx(closed, rel=5e-4)
    assert epsilon([event(1 - 1e-9, 4, 10), event(1, 4, 20)], DELTA) == pytest.approx(closed, rel=5e-4)


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta"),
    [
        (600 / 67349, 3.414, 10_000, 1e-5),
        (600 / 67349, 1.428, 10_000, 1e-5),
        (0.001, 5, 10_000, 1e-6),  # ends at .072
        (0.5, 10, 1500, 1e-5),
        (0.00017, 2, 500, 5e-7),  # far below its Renyi bound
        (0.1, 3, 1, 1e-5),
    ],
)
def test_the_grid_is_fine_enough(q: float, sigma: float, steps: int, delta: float) -> None:
    """Against the same method on a grid several times finer, so that it adds next to nothing."""
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    found = epsilon([event(q, sigma, steps)], delta)
    interval = max(found, FINE) / math.sqrt(steps) / 400
    step = from_gaussian_mechanism(sigma, sampling_prob=q, value_discretization_interval=interval)
    exact = (step.self_compose(steps) if steps > 1 else step).get_epsilon_for_delta(delta)
    assert exact - 1e-4 * max(exact, FINE) <= found <= exact + 4e-4 * max(exact, FINE)


# --- figures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "pld", "rdp"),
    [
        (3, 0.814, 0.865),
        pytest.param(1, 1.415, 1.513, marks=pytest.mark.slow),
        pytest.param(8, 0.586, 0.616, marks=pytest.mark.slow),
    ],
)
def test_published_multipliers(target: float, pld: float, rdp: float) -> None:
    """q .01, 1,000 steps: a calibration by PLD saves 5 to 7 % of noise."""
    assert calibrate(target, DELTA, 0.01, 1000) == pytest.approx(pld, rel=2e-3)
    assert epsilon([event(0.01, rdp, 1000)], DELTA, "rdp") == pytest.approx(target, rel=0.01)


@pytest.mark.parametrize(
    ("rows", "target", "multiplier"),
    [
        pytest.param(67_349, 6, 0.949, marks=pytest.mark.slow),
        (67_349, 3, 1.428),
        pytest.param(67_349, 1, 3.414, marks=pytest.mark.slow),
        pytest.param(392_702, 6, 0.522, marks=pytest.mark.slow),
        pytest.param(392_702, 3, 0.622, marks=pytest.mark.slow),
        pytest.param(392_702, 1, 0.872, marks=pytest.mark.slow),
    ],
)
def test_multipliers_of_three_equal_sites(rows: int, target: float, multiplier: float) -> None:
    """SST-2 and MNLI on three sites, 200 expected rows a batch, 10,000 steps."""
    assert calibrate(target, DELTA, 600 / rows, 10_000) == pytest.approx(multiplier, rel=2e-3)


def test_twenty_rounds_are_one_ledger() -> None:
    """The wrong ways: a ledger that is reset each round shows .90, adding up the rounds 17.98 (by PRV)."""
    rounds = [event(0.0625, 1, 8)] * 20
    checked = cross_checked(rounds, 1e-3)
    assert checked.prv == pytest.approx(3.63, abs=0.01)
    assert checked.pld == pytest.approx(3.62, abs=0.01)
    assert epsilon(rounds[:1], 1e-3) == pytest.approx(0.89, abs=0.01)


# --- calibration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "delta", "q", "steps", "spent"),
    [
        (2, 1e-5, 0.02, 500, []),
        pytest.param(0.05, 1e-6, 0.004, 50, [], marks=pytest.mark.slow),
        pytest.param(30, 1e-5, 0.2, 20, [], marks=pytest.mark.slow),
        (4, 1e-5, 1.0, 12, []),
        pytest.param(3, 1e-5, 0.03, 200, [event(0.01, 1, 500), event(0.05, 2, 10)], marks=pytest.mark.slow),
    ],
)
def test_calibration_is_the_inverse_of_epsilon(
    target: float, delta: float, q: float, steps: int, spent: list[PrivacyEvent]
) -> None:
    sigma = calibrate(target, delta, q, steps, spent)
    assert epsilon([*spent, event(q, sigma, steps)], delta) <= target
    assert epsilon([*spent, event(q, sigma / 1.001, steps)], delta) > target


def test_what_was_spent_needs_more_noise() -> None:
    spent = [event(0.01, 1, 500)]
    assert calibrate(3, DELTA, 0.01, 1000, spent) > calibrate(3, DELTA, 0.01, 1000)
    assert calibrate(3, DELTA, 0.01, 1000, [event(0.01, 1, 0)]) == calibrate(3, DELTA, 0.01, 1000)


@pytest.mark.slow
def test_calibration_of_a_run_that_continues_one_finds_its_noise_again() -> None:
    sigma = calibrate(2, DELTA, 0.02, 300)
    again = calibrate(2, DELTA, 0.02, 200, [event(0.02, sigma, 100)])
    assert again == pytest.approx(sigma, rel=2e-3)


def test_a_budget_that_is_used_up_is_refused_with_the_remedy() -> None:
    spent = [event(0.02, 1, 500)]
    used = epsilon(spent, DELTA)
    for target in (used, used / 2):
        with refuses(ConfigError, "epsilon-spent"):
            calibrate(target, DELTA, 0.01, 100, spent)
    with refuses(ConfigError, "epsilon-spent") as caught:
        calibrate(8, DELTA, 0.01, 100, [event(0.02, 0, 1)])
    assert "epsilon inf" in str(caught.value)
    with refuses(ConfigError, "no-steps"):
        calibrate(8, DELTA, 0.01, 0)


def test_a_target_beyond_any_need_gets_the_least_noise() -> None:
    assert calibrate(1e5, DELTA, 1.0, 10) == LEAST_NOISE


def test_a_calibrated_run_fits_its_rounds_exactly() -> None:
    sigma = calibrate(3, DELTA, 0.02, 20 * 25)
    a_round = [event(0.02, sigma, 25)]
    assert epsilon(a_round * 20, DELTA) <= 3 < epsilon(a_round * 21, DELTA)


# --- the rest ---------------------------------------------------------------------------------------------


def test_events_have_one_canonical_form() -> None:
    parts = [event(0.1, 2, 3), event(0.1, 1, 0), event(0.05, 1, 4), event(0.1, 2, 5)]
    assert grouped(parts) == (event(0.05, 1, 4), event(0.1, 2, 8))
    assert grouped(reversed(parts)) == grouped(parts)


def test_extremes_are_bounds_and_not_errors() -> None:
    assert epsilon([event(0.1, 1e-7, 10)], DELTA) == math.inf
    assert epsilon([event(0.5, 0.5, 1000)], DELTA) > 100
    assert epsilon([event(1e-9, 0.5, 100)], DELTA) == 0  # drawn at all with a chance of 1e-7 < delta
    assert 0 < epsilon([event(0.01, 1e4, 10_000)], DELTA) < 1e-3


def test_orders_that_do_not_converge_are_no_news(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        epsilon([event(0.139159, 0.692313, 1545)], DELTA, "rdp")
    assert not caplog.records


def test_delta_of_a_site() -> None:
    assert default_delta(500) == 1e-5
    assert default_delta(1_000_000) == pytest.approx(1e-7)
    check_delta(default_delta(40), 40)
    check_delta(9e-4, 1000)
    with refuses(ConfigError, "delta-too-large") as caught:
        check_delta(1e-3, 1000)
    assert all(said in str(caught.value) for said in ("privacy.delta", "0.001", "1000 units", "1e-05"))


def test_a_cross_check_survives_json_and_knows_its_limits() -> None:
    noiseless = cross_checked([event(0.1, 0, 1)], DELTA)
    assert noiseless == CrossCheck(pld=math.inf, rdp=math.inf, prv=math.inf)
    assert CrossCheck.model_validate_json(noiseless.model_dump_json()) == noiseless
    assert cross_checked([], DELTA) == CrossCheck(pld=0, rdp=0, prv=0)
    assert cross_checked([event(1, 2, 5)], DELTA).prv is None
    assert cross_checked([event(0.1, 2, 5)], DELTA, prv=False).prv is None


def test_its_modules_load_nothing_heavy() -> None:
    program = """
import sys
import quorate.shared.privacy.client_level, quorate.shared.privacy.accounting
import quorate.shared.privacy.calibration
assert not {"torch", "scipy", "numpy", "dp_accounting", "opacus"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_target_out_of_reach_of_any_noise_says_so() -> None:
    with refuses(ConfigError, "epsilon-out-of-reach", where="privacy.target_epsilon") as caught:
        calibrate(1e-9, 1e-9, 0.1, 10)
    assert "delta 1e-09" in str(caught.value)
