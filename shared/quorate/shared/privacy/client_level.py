"""Client-level accounting: noise at the server hides a site's whole update (DP-FedAvg, arXiv:1710.06963).

The mechanism of a round: every site takes part with probability q, its update is clipped to L2 norm C, the
server adds N(0, (z C)^2 I) to the sum and divides by the *expected* number of participants q K. That
denominator is fixed on purpose: dividing by the number of sites that did take part, or weighting by examples,
makes the sensitivity depend on the data, and the real multiplier smaller than z.
"""

from __future__ import annotations

from quorate.shared.errors import ConfigError
from quorate.shared.privacy.privacy_event import PrivacyEvent

COUNT_NOISE_SHARE = 1 / 20
"""Noise on the count of small updates, over the expected participants (Andrew et al., arXiv:1905.03871)."""


def client_rounds(
    noise_multiplier: float, *, sites: int, cohort: float, rounds: int, participation_hidden: bool
) -> PrivacyEvent:
    """Return what `rounds` rounds do to a site, of `sites` of which `cohort` are expected in a round.

    The sampling amplifies privacy only where it is random, enforced by the server, and hidden
    (`participation_hidden`); whoever sees who takes part gets q = 1, as if every site were in every round.

    Raises: ConfigError: for a cohort that is no number between 0 and `sites`.
    """
    if not 0 < cohort <= sites:
        raise ConfigError(f"federation: {cohort:g} of {sites} sites cannot take part; give 1 to {sites}.")
    probability = cohort / sites if participation_hidden else 1.0
    return PrivacyEvent(sampling_probability=probability, noise_multiplier=noise_multiplier, steps=rounds)


def count_noise(cohort: float) -> float:
    """Return the standard deviation [sites] of the noise on the count of small updates."""
    return COUNT_NOISE_SHARE * cohort


def sum_multiplier(noise_multiplier: float, count_std: float) -> float:
    """Return the noise multiplier z_sum of the sum with which sum and count together have multiplier z.

    Adaptive clipping releases, besides the sum, how many sites were below the clipping norm, with noise of
    standard deviation `count_std`. Counted as b - 1/2 each site moves it by 1/2, so its own multiplier is
    2 count_std, and z^-2 = z_sum^-2 + (2 count_std)^-2 (Andrew et al., arXiv:1905.03871, theorem 1).

    Raises: ConfigError: where the count alone spends as much as z allows, that is z >= 2 count_std.
    """
    if noise_multiplier >= 2 * count_std:
        raise ConfigError(
            f"privacy.adaptive_quantile cannot be kept with noise multiplier {noise_multiplier:.4g}: the "
            f"count of small updates, with noise {count_std:.4g}, would spend the budget by itself; it needs "
            f"noise above {noise_multiplier / 2:.4g}. Let at least {_cohort_needed(noise_multiplier)} sites "
            "take part in a round, or leave privacy.adaptive_quantile out and clip to a fixed norm.",
            kind="quantile-too-noisy",
        )
    return float((noise_multiplier**-2 - (2 * count_std) ** -2) ** -0.5)


def _cohort_needed(noise_multiplier: float) -> int:
    """Return the fewest expected participants whose `count_noise` exceeds half of the multiplier."""
    return int(noise_multiplier / 2 / COUNT_NOISE_SHARE) + 1
