"""One contract for both accountants: what any sound epsilon does as events are split, added, made noisier."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quorate.shared.errors import ConfigError
from quorate.shared.privacy.accounting import Accountant, epsilon
from quorate.shared.privacy.privacy_event import PrivacyEvent

DELTA = 1e-5
ROUNDING = 5e-4
"""Relative: epsilons are upper bounds, each with an excess of its own of about 1e-4."""

accountants = pytest.mark.parametrize("accountant", get_args(Accountant))
fast = settings(max_examples=6)

probabilities = st.floats(0.005, 0.3)
multipliers = st.floats(0.7, 4)
events = st.builds(
    PrivacyEvent,
    sampling_probability=probabilities,
    noise_multiplier=multipliers,
    steps=st.integers(1, 300),
)


def event(q: float, sigma: float, steps: int) -> PrivacyEvent:
    return PrivacyEvent(sampling_probability=q, noise_multiplier=sigma, steps=steps)


@accountants
def test_nothing_done_costs_nothing(accountant: Accountant) -> None:
    assert epsilon([], DELTA, accountant) == 0
    assert epsilon([event(0.1, 1, 0), event(0.1, 0, 0)], DELTA, accountant) == 0


@accountants
def test_one_step_without_noise_is_not_private(accountant: Accountant) -> None:
    assert epsilon([event(0.1, 1, 100), event(0.1, 0, 1)], DELTA, accountant) == math.inf


@accountants
@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_is_a_probability(accountant: Accountant, delta: float) -> None:
    with pytest.raises(ConfigError) as caught:
        epsilon([event(0.1, 1, 1)], delta, accountant)
    assert f"privacy.delta is {delta:g};" in str(caught.value)


@accountants
@given(event=events, cuts=st.lists(st.integers(0, 300), max_size=5))
@fast
def test_jobs_and_crashes_compose_to_one_long_job(
    accountant: Accountant, event: PrivacyEvent, cuts: list[int]
) -> None:
    """A ledger with a line for each round, of several jobs, costs exactly what a single line costs."""
    borders = sorted({0, event.steps, *(cut for cut in cuts if cut < event.steps)})
    parts = [event.model_copy(update={"steps": stop - start}) for start, stop in pairwise(borders)]
    assert epsilon(parts, DELTA, accountant) == epsilon([event], DELTA, accountant)


@accountants
@given(events=st.lists(events, min_size=2, max_size=3), data=st.data())
@fast
def test_order_does_not_matter(
    accountant: Accountant, events: list[PrivacyEvent], data: st.DataObject
) -> None:
    other = data.draw(st.permutations(events))
    assert epsilon(events, DELTA, accountant) == epsilon(other, DELTA, accountant)


@accountants
@given(event=events, more=st.floats(1.01, 3))
@fast
def test_more_of_it_costs_more_and_noise_saves(
    accountant: Accountant, event: PrivacyEvent, more: float
) -> None:
    def cost(**changed: float) -> float:
        return epsilon([event.model_copy(update=changed)], DELTA, accountant)

    least = cost() * (1 - ROUNDING)
    assert cost(steps=math.ceil(event.steps * more)) >= least
    assert cost(sampling_probability=min(1.0, event.sampling_probability * more)) >= least
    assert cost(noise_multiplier=event.noise_multiplier / more) >= least
    assert epsilon([event], DELTA / more, accountant) >= least


@accountants
@given(one=events, other=events)
@fast
def test_together_costs_more_than_either_and_no_more_than_both(
    accountant: Accountant, one: PrivacyEvent, other: PrivacyEvent
) -> None:
    both = epsilon([one, other], 2 * DELTA, accountant)
    alone = [epsilon([each], DELTA, accountant) for each in (one, other)]
    assert both <= sum(alone) * (1 + ROUNDING)
    assert epsilon([one, other], DELTA, accountant) >= max(alone) * (1 - ROUNDING)


@given(events=st.lists(events, min_size=1, max_size=2))
@fast
def test_loss_distributions_are_the_tighter_bound(events: list[PrivacyEvent]) -> None:
    assert epsilon(events, DELTA, "pld") <= epsilon(events, DELTA, "rdp") * (1 + ROUNDING)
