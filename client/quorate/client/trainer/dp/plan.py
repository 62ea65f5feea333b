"""What DP-SGD does at one site over a whole run, settled before the first step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from quorate.shared.config.privacy_config import SitePrivacy
from quorate.shared.config.run_config import RunConfig, TrainingConfig
from quorate.shared.errors import ConfigError
from quorate.shared.privacy.accounting import check_delta, default_delta, epsilon
from quorate.shared.privacy.calibration import calibrate
from quorate.shared.privacy.claim import PrivacyClaim
from quorate.shared.privacy.privacy_event import PrivacyEvent


@dataclass(frozen=True)
class PrivatePlan:
    """The mechanism at a site: Poisson batches of `units`, clipping, Gaussian noise on the sum.

    Args:
        unit: what is protected: a training row, or all rows of a group.
        units: how many the site has; taken as public.
        sampling_probability: of a unit in a step.
        steps_per_round: optimiser steps, empty batches included.
        rounds: of the run; calibration counts all of them, also where a site is not asked in each.
        noise_multiplier: standard deviation of the noise over the clipping norm.
        clipping_norm: L2 norm to which a unit's gradient is clipped.
        delta: of the claim.
    """

    unit: Literal["record", "group"]
    units: int
    sampling_probability: float
    steps_per_round: int
    rounds: int
    noise_multiplier: float
    clipping_norm: float
    delta: float

    @property
    def expected_batch(self) -> float:
        """Expected units in a batch, by which the noisy sum is divided whatever the batch holds."""
        return self.sampling_probability * self.units

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.rounds * self.steps_per_round

    def event(self) -> PrivacyEvent:
        """Return what one round does to the data."""
        return self._event(self.steps_per_round)

    def whole_event(self) -> PrivacyEvent:
        """Return what all rounds of the run do to the data."""
        return self._event(self.total_steps)

    def claim(self) -> PrivacyClaim:
        """Return what the site says of the whole run before it starts.

        Raises: ConfigError: so little noise has no finite epsilon.
        """
        total = _epsilon(self.whole_event(), self.delta)
        if not math.isfinite(total):
            raise ConfigError(
                f"privacy.noise_multiplier {self.noise_multiplier:g} is too little noise for any epsilon; "
                "raise it, or give target_epsilon.",
                kind="too-little-noise",
            )
        return PrivacyClaim(
            unit=self.unit,
            units=self.units,
            epsilon=total,
            delta=self.delta,
            noise_multiplier=self.noise_multiplier,
            sampling_probability=self.sampling_probability,
            steps=self.total_steps,
            clipping_norm=self.clipping_norm,
        )

    def _event(self, steps: int) -> PrivacyEvent:
        return PrivacyEvent(
            sampling_probability=self.sampling_probability,
            noise_multiplier=self.noise_multiplier,
            steps=steps,
        )


def steps_a_round(training: TrainingConfig, units: int, batch: int) -> int:
    """Return the steps of a round: max_steps, or as many batches as make num_train_epochs passes."""
    return training.max_steps or training.num_train_epochs * math.ceil(units / batch)


def private_plan(run: RunConfig, units: int) -> PrivatePlan:
    """Settle the mechanism for a site with so many records or groups, at least one.

    The expected batch is per_device_train_batch_size * gradient_accumulation_steps units, or all of them
    where there are fewer.

    Raises: ConfigError: delta is too large for so many units; the target cannot be reached.
    """
    privacy, training = run.privacy, run.training
    assert isinstance(privacy, SitePrivacy), "only called where it is"
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    probability = min(1.0, batch / units)
    steps = steps_a_round(training, units, batch)
    rounds = run.federation.rounds
    if privacy.delta is None:
        delta = default_delta(units)
    else:
        delta = privacy.delta
        check_delta(delta, units)
    if privacy.target_epsilon is not None:
        multiplier = calibrate(privacy.target_epsilon, delta, probability, rounds * steps)
    else:
        assert privacy.noise_multiplier is not None, "the configuration has one of the two"
        multiplier = privacy.noise_multiplier
    return PrivatePlan(
        unit=privacy.unit,
        units=units,
        sampling_probability=probability,
        steps_per_round=steps,
        rounds=rounds,
        noise_multiplier=multiplier,
        clipping_norm=privacy.max_grad_norm,
        delta=delta,
    )


@lru_cache(maxsize=1024)
def _epsilon(event: PrivacyEvent, delta: float) -> float:
    return epsilon([event], delta)
