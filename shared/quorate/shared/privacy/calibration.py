"""The least noise that keeps a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

from quorate.shared.errors import ConfigError
from quorate.shared.privacy.accounting import epsilon, rough_bound
from quorate.shared.privacy.privacy_event import PrivacyEvent
from quorate.shared.privacy.rounding import at_most

LEAST_NOISE = 0.01
"""Noise multipliers below this are not considered: a step's epsilon is in the thousands there."""
MOST_NOISE = 1e6
"""Nor are those above this: no gradient would be left."""
_PRECISION = 4e-4
"""Relative precision of a calibrated noise multiplier."""
_ABOUT = 0.02
"""And of where the search for it starts."""


def calibrate(
    target_epsilon: float,
    delta: float,
    sampling_probability: float,
    steps: int,
    spent: Sequence[PrivacyEvent] = (),
) -> float:
    """Return the smallest noise multiplier with which `steps` more steps stay within `target_epsilon`.

    `spent` is what was done to the same units before, in this run or another. The result's own epsilon, by
    privacy loss distributions, is at most the target, and the multiplier exceeds the smallest such by less
    than 0.1 %. Calibrate once, for all steps of a run: noise for each round's share of epsilon would be far
    too much.

    It takes seconds, and is asked for again in every round and for sites of one size: answers are kept.

    Raises: ConfigError: where no noise is enough, because `spent` has used the budget up; or for no steps.
    """
    return _calibrated(target_epsilon, delta, sampling_probability, steps, tuple(spent))


@lru_cache(maxsize=1024)
def _calibrated(
    target_epsilon: float,
    delta: float,
    sampling_probability: float,
    steps: int,
    spent: tuple[PrivacyEvent, ...],
) -> float:
    if steps < 1:
        message = f"privacy: {steps} steps were asked for; noise is calibrated to at least 1."
        raise ConfigError(message, kind="no-steps")
    used = epsilon(spent, delta)
    if used >= target_epsilon:
        raise _used_up(target_epsilon, delta, used)

    def events(noise: float) -> list[PrivacyEvent]:
        these = PrivacyEvent(sampling_probability=sampling_probability, noise_multiplier=noise, steps=steps)
        return [*spent, these]

    # The Renyi bound is cheap and a little too large, so it says where to start.
    start = _smallest(lambda noise: rough_bound(events(noise), delta), target_epsilon, precision=_ABOUT)
    found = _smallest(
        lambda noise: epsilon(events(noise), delta), target_epsilon, start=start or 1.0, stride=1.1
    )
    if found is None:
        raise _used_up(target_epsilon, delta, used)
    return found


def _used_up(target: float, delta: float, used: float) -> ConfigError:
    if used == 0:
        return ConfigError(
            f"privacy.target_epsilon: {target:g} at delta {delta:g} is out of reach of any noise multiplier "
            f"up to {MOST_NOISE:g}; raise it.",
            kind="epsilon-out-of-reach",
        )
    return ConfigError(
        f"privacy: these data have already spent epsilon {at_most(used, 4)} (delta {delta:g}), so no amount "
        f"of noise keeps another step within privacy.target_epsilon {target:g}; raise that, or train on "
        "units that no earlier run has used.",
        kind="epsilon-spent",
    )


def _smallest(
    cost: Callable[[float], float],
    target: float,
    *,
    start: float = 1.0,
    stride: float = 2.0,
    precision: float = _PRECISION,
) -> float | None:
    """Return the smallest noise multiplier whose `cost` is at most `target`, to `precision` and never less.

    `cost` falls with noise. A bracket grows from `start` by factors `stride`, `stride`^2, ...; then Brent's
    method finds the root in logarithms, where the curve is almost straight. `LEAST_NOISE` if that is enough,
    None if not even `MOST_NOISE` is.
    """
    from scipy.optimize import brentq

    def excess(log_noise: float) -> float:
        """Logarithm of cost over target, bounded since either may be 0 or infinite."""
        ratio = cost(math.exp(log_noise)) / target
        return math.log(min(max(ratio, 1e-9), 1e9))

    low = high = start
    factor = stride
    while cost(high) > target:
        if high >= MOST_NOISE:
            return None
        low, high, factor = high, min(high * factor, MOST_NOISE), factor**2
    factor = stride
    while low == high or cost(low) <= target:
        high = low
        if high <= LEAST_NOISE:
            return high
        low, factor = max(low / factor, LEAST_NOISE), factor**2
    found = math.exp(brentq(excess, math.log(low), math.log(high), xtol=precision / 2))
    while cost(found) > target:  # Brent's method ends on either side of the root
        found *= 1 + precision / 2
    return found
