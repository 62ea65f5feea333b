"""Client-level accounting: amplification only where it is earned, and the split for adaptive clipping."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import refuses

from quorate.shared.errors import ConfigError
from quorate.shared.privacy.accounting import epsilon
from quorate.shared.privacy.client_level import client_rounds, count_noise, sum_multiplier


@pytest.mark.parametrize(
    ("cohort", "hidden", "pld"),
    [(10, True, 0.52), (100, True, 5.97), (1000, True, 86.34), (10, False, 86.34), (100, False, 86.34)],
)
def test_a_thousand_sites_for_a_hundred_rounds(cohort: int, hidden: bool, pld: float) -> None:
    """Without amplification the exact figure is 86.34 (sigma .1, once), and 90.9 that of Renyi."""
    done = client_rounds(1, sites=1000, cohort=cohort, rounds=100, participation_hidden=hidden)
    assert epsilon([done], 1e-4) == pytest.approx(pld, rel=0.02)
    if done.sampling_probability == 1:
        assert epsilon([done], 1e-4, "rdp") == pytest.approx(90.9, rel=1e-3)


def test_ten_hospitals_are_too_few() -> None:
    """50 rounds of all of them at epsilon 8 take a noise multiplier of 4.24."""
    from quorate.shared.privacy.calibration import calibrate

    everyone = client_rounds(1, sites=10, cohort=10, rounds=50, participation_hidden=True)
    assert calibrate(8, 1e-5, everyone.sampling_probability, everyone.steps) == pytest.approx(4.24, rel=0.02)


@pytest.mark.parametrize("cohort", [0, -1, 11])
def test_a_cohort_is_some_of_the_sites(cohort: int) -> None:
    with refuses(ConfigError, where="federation") as caught:
        client_rounds(1, sites=10, cohort=cohort, rounds=1, participation_hidden=True)
    assert "10 sites" in str(caught.value)


@given(z=st.floats(0.1, 10), cohort=st.integers(2, 10_000))
def test_the_split_spends_what_it_was_given(z: float, cohort: int) -> None:
    """Sum with z_sum and count with 2 sigma_b are, as one Gaussian mechanism, the one with z."""
    std = count_noise(cohort)
    if z >= 2 * std:
        with refuses(ConfigError, "quantile-too-noisy"):
            sum_multiplier(z, std)
        return
    split = sum_multiplier(z, std)
    assert split > z
    assert math.isclose(split**-2 + (2 * std) ** -2, z**-2, rel_tol=1e-9)


def test_the_cohort_that_an_error_asks_for_is_enough_and_one_less_is_not() -> None:
    with refuses(ConfigError, "quantile-too-noisy") as refused:
        sum_multiplier(1, count_noise(10))
    assert "11 sites" in str(refused.value)
    assert sum_multiplier(1, count_noise(11)) > 1
