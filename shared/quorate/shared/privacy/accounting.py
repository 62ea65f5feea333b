"""Epsilon of privacy events: by privacy loss distributions, and by Renyi divergence as a cruder bound.

Both come from google/dp-accounting and are upper bounds for adding or removing one unit. Which differences
matter, and how the units of several sites go together:

- All events that touched the same units compose: pass them in one call. Epsilons must not be added, and a
  ledger must not be reset between rounds or jobs.
- Sites with disjoint units compose in parallel: their epsilon is the largest of theirs. A unit that may be at
  two sites (a patient of two hospitals) is not covered by it; such sites' events belong in one call.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Literal

from quorate.shared.errors import ConfigError
from quorate.shared.privacy.privacy_event import PrivacyEvent

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

Accountant = Literal["pld", "rdp"]

EXCESS = 1e-4
"""Share of epsilon by which the grid of the privacy losses may overstate it, about."""
FINE = 0.01
"""Below this epsilon, the excess is a share of this one instead."""
BOUNDLESS = 1e6
"""An epsilon whose Renyi bound is above this is called infinite: its grid would not fit into memory."""
_STEP_POINTS = 2**20
"""Most grid points for the losses of one step: 8 MiB, and about a second."""
_COARSEST = 0.01
"""Widest grid [nats] unless epsilon is so large that memory asks for more."""
_FEW_ORDERS = (
    1.1, 1.2, 1.4, 1.7, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 50, 63, 128, 256, 512, 1024,
)  # fmt: skip
"""Of dp-accounting's 156 Renyi orders, those of `rough_bound`."""


def epsilon(events: Iterable[PrivacyEvent], delta: float, accountant: Accountant = "pld") -> float:
    """Return the epsilon [nats] at which all `events` together are (epsilon, delta)-private.

    `pld` is the one to rely on: it overstates the exact epsilon by about `EXCESS` of it, where `rdp`
    overstates it by 5 to 20 %, and more where few steps take few units. How events are ordered or split
    changes neither by a bit. Results are remembered: before each round only what is new is computed.
    Infinite if a step had no noise (`pld`: or next to none, see `BOUNDLESS`); 0 without steps.

    Raises: ConfigError: for a delta outside (0, 1).
    """
    if not 0 < delta < 1:
        raise ConfigError(f"privacy.delta is {delta:g}; give a probability between 0 and 1, such as 1e-5.")
    return _epsilon(grouped(events), delta, accountant)


def rough_bound(events: Iterable[PrivacyEvent], delta: float) -> float:
    """Return an upper bound of `epsilon`, in a third of the time of `rdp` and up to a fifth above it."""
    return _rough_bound(grouped(events), delta)


def grouped(events: Iterable[PrivacyEvent]) -> tuple[PrivacyEvent, ...]:
    """Return the canonical form of `events`: one for each mechanism, sorted, none without steps."""
    steps: Counter[tuple[float, float]] = Counter()
    for event in events:
        steps[event.sampling_probability, event.noise_multiplier] += event.steps
    return tuple(
        PrivacyEvent(sampling_probability=q, noise_multiplier=sigma, steps=count)
        for (q, sigma), count in sorted(steps.items())
        if count
    )


def default_delta(units: int) -> float:
    """Return the delta of a site with `units` units that states none: 1e-5, or a tenth of 1 / units."""
    return min(1e-5, 0.1 / units)


def check_delta(delta: float, units: int) -> None:
    """Refuse a delta that would allow to publish one of `units` units outright.

    Raises: ConfigError: for a delta of at least 1 / units.
    """
    if delta * units >= 1:
        raise ConfigError(
            f"privacy.delta is {delta:g}, but there are {units} units, and at 1 / {units} = {1 / units:g} a "
            f"unit could be published whole; set privacy.delta to {default_delta(units):g} or leave it out.",
            kind="delta-too-large",
        )


@lru_cache(maxsize=4096)
def _epsilon(groups: tuple[PrivacyEvent, ...], delta: float, accountant: Accountant) -> float:
    if not groups:
        return 0.0
    if any(group.noise_multiplier == 0 for group in groups):
        return math.inf
    if accountant == "rdp":
        return _by_rdp(groups, delta)
    bound = _rough_bound(groups, delta)
    if bound == 0:
        return 0.0
    if not bound < BOUNDLESS:
        return math.inf
    found = _by_pld(groups, delta, bound)
    while found < bound / 2 and bound > FINE:  # the grid was made for a far larger epsilon
        bound = max(found, FINE)
        found = _by_pld(groups, delta, bound)
    return found


@lru_cache(maxsize=4096)
def _rough_bound(groups: tuple[PrivacyEvent, ...], delta: float) -> float:
    return _by_rdp(groups, delta, _FEW_ORDERS)


def _by_rdp(groups: tuple[PrivacyEvent, ...], delta: float, orders: tuple[float, ...] | None = None) -> float:
    """Renyi accounting (Mironov et al., arXiv:1908.10530); dp-accounting's default orders for None."""
    import dp_accounting

    accountant = dp_accounting.rdp.RdpAccountant(orders)
    with _without_words_on_orders():
        for group in groups:
            step = dp_accounting.GaussianDpEvent(group.noise_multiplier)
            sampled = dp_accounting.PoissonSampledDpEvent(group.sampling_probability, step)
            accountant.compose(sampled, group.steps)
    return float(accountant.get_epsilon(delta))


@contextmanager
def _without_words_on_orders() -> Iterator[None]:
    """Leave out the warnings of orders whose series does not converge: any other order is a bound, too."""

    def other(record: logging.LogRecord) -> bool:
        return "failed to converge" not in str(record.msg)

    logger = logging.getLogger("absl")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def _by_pld(groups: tuple[PrivacyEvent, ...], delta: float, about: float) -> float:
    """Privacy loss distributions, rounded upwards by "connect the dots" (arXiv:2207.04380).

    Steps without sampling are one Gaussian mechanism, whose epsilon is known in closed form
    (Balle and Wang, arXiv:1805.06530) where there are no others.
    """
    import numpy as np
    from dp_accounting import get_epsilon_gaussian
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    mechanisms = [group for group in groups if group.sampling_probability < 1]
    precision = sum(g.steps / g.noise_multiplier**2 for g in groups if g.sampling_probability == 1)
    if not mechanisms:
        return float(get_epsilon_gaussian(precision**-0.5, delta))
    if precision:
        unsampled = PrivacyEvent(sampling_probability=1, noise_multiplier=precision**-0.5, steps=1)
        mechanisms.append(unsampled)
    interval = _grid_interval(mechanisms, delta, about)

    def distribution(group: PrivacyEvent) -> PrivacyLossDistribution:
        one = from_gaussian_mechanism(
            group.noise_multiplier,
            sampling_prob=group.sampling_probability,
            value_discretization_interval=interval,
        )
        return one.self_compose(group.steps) if group.steps > 1 else one

    first, *others = map(distribution, mechanisms)
    composed = reduce(lambda one, other: one.compose(other), others, first)
    with np.errstate(over="ignore"):  # losses of hundreds, where infinity compares as it should
        return float(composed.get_epsilon_for_delta(delta))


def _grid_interval(groups: Collection[PrivacyEvent], delta: float, about: float) -> float:
    """Return the grid's interval [nats] that overstates epsilon by about `EXCESS` of it.

    `about` is that epsilon or an upper bound of it.

    Rounding a loss to grid points h apart adds a variance of about h^2 / 6 to it, T steps add T h^2 / 6. A
    variance v more costs order * v / 2 in epsilon, where the order that decides is about
    2 ln(1 / delta) / epsilon. Hence h = epsilon sqrt(6 EXCESS / (T ln(1 / delta))). The fixed 1e-4 of
    dp-accounting is finer than needed for 10,000 steps that end at epsilon 6, and so coarse for 10,000 that
    end at .072 that it overstates this by 2 %.
    """
    steps = sum(group.steps for group in groups)
    wanted = about * math.sqrt(6 * EXCESS / (steps * math.log(1 / delta)))
    widest = max(_COARSEST, 1e-6 * about)
    return max(min(wanted, widest), max(map(_span, groups)) / _STEP_POINTS)


def _span(event: PrivacyEvent) -> float:
    """Width [nats] of one step's losses between 10 standard deviations to either side."""
    q, sigma = event.sampling_probability, event.noise_multiplier

    def loss(noise: float) -> float:
        """ln(1 - q + q e^x), for the x of a unit that takes part and `noise` standard deviations."""
        x = (1 + 2 * noise * sigma) / (2 * sigma**2)
        return x if q == 1 else max(math.log1p(-q), x + math.log(q)) + math.log(2)

    return loss(10) - (loss(-10) if q == 1 else math.log1p(-q))
