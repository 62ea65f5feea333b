"""Epsilon by three accountants side by side, for forecasts and reports; too slow for every round."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

from pydantic import ConfigDict

from quorate.shared.config.config_model import ConfigModel
from quorate.shared.privacy.accounting import epsilon, grouped
from quorate.shared.privacy.privacy_event import PrivacyEvent


class CrossCheck(ConfigModel):
    """Epsilon of the same events by independent accountants; infinite where a step had no noise."""

    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="strings")

    pld: float
    """By privacy loss distributions: the figure to rely on."""
    rdp: float
    """By Renyi divergence: an upper bound that older papers report."""
    prv: float | None
    """By Opacus (Gopi et al., arXiv:2106.02848), which adds .01 for its own error; None if it was not asked,
    or if a step takes every unit, where Opacus' formula takes the logarithm of 0."""


def cross_checked(events: Iterable[PrivacyEvent], delta: float, *, prv: bool = True) -> CrossCheck:
    """Return the epsilon [nats] of `events` at `delta` by each accountant.

    `prv` imports torch and takes seconds, the more the larger epsilon is. Raises: ConfigError: as `epsilon`.
    """
    groups = grouped(events)
    return CrossCheck(
        pld=epsilon(groups, delta),
        rdp=epsilon(groups, delta, "rdp"),
        prv=_by_prv(groups, delta) if prv else None,
    )


def _by_prv(groups: tuple[PrivacyEvent, ...], delta: float) -> float | None:
    if not groups:
        return 0.0
    if any(group.noise_multiplier == 0 for group in groups):
        return math.inf
    if any(group.sampling_probability == 1 for group in groups):
        return None
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [
        (group.noise_multiplier, group.sampling_probability, group.steps) for group in groups
    ]
    with warnings.catch_warnings():
        # It sizes its grid by Renyi bounds of few orders, and says so where others would fit better.
        warnings.filterwarnings("ignore", "Optimal order is the", UserWarning)
        return float(accountant.get_epsilon(delta))
