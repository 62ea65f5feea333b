"""What a private run will cost before it starts: noise, epsilon, bytes, and how other settings would do."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from quorate.shared.adapters.adapter import is_lora_a, is_lora_b, num_values
from quorate.shared.config.config_model import ConfigModel, UnboundedModel
from quorate.shared.config.privacy_config import SitePrivacy
from quorate.shared.errors import ConfigError
from quorate.shared.privacy.accounting import check_delta, default_delta, epsilon, grouped
from quorate.shared.privacy.calibration import calibrate
from quorate.shared.privacy.privacy_event import PrivacyEvent

BYTES_PER_VALUE = 4
"""Adapters travel as float32."""


class Plan(UnboundedModel):
    """One choice of settings for a site, and what follows from it; epsilons may be infinite."""

    change: str
    """What differs from the run file: `as configured`, `half the rank`, `twice the batch`, ..."""
    trained_values: int
    """d: numbers that are trained, noised and sent."""
    batch: int
    """Expected units in a step's batch, B."""
    rounds: int
    steps: int
    sampling_probability: float
    """Chance of a unit to be in a batch: B over the site's units."""
    noise_multiplier: float
    """Standard deviation of the noise over the clipping norm."""
    epsilon_pld: float
    """After all rounds, by privacy loss distributions."""
    epsilon_rdp: float
    """The same by Renyi divergence."""
    epsilon_prv: float | None
    """The same by Opacus; None where it was not asked or takes no such event."""
    relative_noise: float
    """Expected norm of a step's noise over the clipping norm, which bounds the signal: sigma sqrt(d) / B."""
    bytes_each_way: int
    """Adapter bytes that the site sends in a round, and as many that it receives, without headers (and
    without the residual factors that `fedex` sends down)."""

    @property
    def event(self) -> PrivacyEvent:
        """What all rounds do to the units."""
        return PrivacyEvent(
            sampling_probability=self.sampling_probability,
            noise_multiplier=self.noise_multiplier,
            steps=self.steps,
        )


class Forecast(ConfigModel):
    """A site's plan and its neighbours, at one delta."""

    delta: float
    """Probability with which the claim may fail."""
    units: int
    """Records or groups of the site."""
    configured: Plan
    alternatives: tuple[Plan, ...]
    """Rank, rounds and batch, each halved and doubled, where that is possible."""


@dataclass(frozen=True)
class _Choice:
    """The settings that a plan varies."""

    change: str
    shapes: Mapping[str, tuple[int, ...]]
    batch: int
    rounds: int


@dataclass(frozen=True)
class _Site:
    """What all plans of a site share; the fields are `forecast`'s arguments."""

    privacy: SitePrivacy
    units: int
    delta: float
    steps_a_round: Callable[[int], int]

    def plan(self, choice: _Choice, *, prv: bool = False) -> Plan:
        probability = choice.batch / self.units
        steps = choice.rounds * self.steps_a_round(choice.batch)
        noise = self._noise(probability, steps)
        these = PrivacyEvent(sampling_probability=probability, noise_multiplier=noise, steps=steps)
        costs = cross_checked([these], self.delta, prv=prv)
        values = num_values(choice.shapes)
        return Plan(
            change=choice.change,
            trained_values=values,
            batch=choice.batch,
            rounds=choice.rounds,
            steps=steps,
            sampling_probability=probability,
            noise_multiplier=noise,
            epsilon_pld=costs.pld,
            epsilon_rdp=costs.rdp,
            epsilon_prv=costs.prv,
            relative_noise=noise * math.sqrt(values) / choice.batch,
            bytes_each_way=BYTES_PER_VALUE * values,
        )

    def _noise(self, probability: float, steps: int) -> float:
        if self.privacy.target_epsilon is not None:
            return calibrate(self.privacy.target_epsilon, self.delta, probability, steps)
        assert self.privacy.noise_multiplier is not None  # the section has one of the two
        return self.privacy.noise_multiplier


def forecast(
    privacy: SitePrivacy,
    *,
    units: int,
    batch: int,
    steps_a_round: Callable[[int], int],
    rounds: int,
    shapes: Mapping[str, tuple[int, ...]],
    prv: bool = False,
) -> Forecast:
    """Return what `privacy` means for a site of `units` records (or groups) before it takes a step.

    Args:
        privacy: the run's section; a target is calibrated, a given multiplier taken as it is.
        units: records or groups in the site's training rows.
        batch: expected units in a batch.
        steps_a_round: expected batch -> steps in a round; constant where the run says `max_steps`.
        rounds: rounds of the run.
        shapes: trained array's name -> shape, as `Adapter.schema` has them, without arrays that stay frozen.
        prv: ask Opacus too, about the configured plan.

    Raises:
        ConfigError: for a batch larger than the site, a delta of 1 / units or more.
    """
    if not 0 < batch <= units:
        raise ConfigError(
            f"a batch of {batch} expected {privacy.unit}s cannot be drawn from {units}; lower "
            "training.per_device_train_batch_size or training.gradient_accumulation_steps.",
            kind="batch-too-large",
        )
    delta = default_delta(units) if privacy.delta is None else privacy.delta
    check_delta(delta, units)
    site = _Site(privacy, units, delta, steps_a_round)
    configured = _Choice("as configured", shapes, batch, rounds)
    return Forecast(
        delta=delta,
        units=units,
        configured=site.plan(configured, prv=prv),
        alternatives=tuple(site.plan(other) for other in _neighbours(configured) if other.batch <= units),
    )


def _neighbours(choice: _Choice) -> list[_Choice]:
    """Return `choice` with one setting halved or doubled; odd numbers are not halved."""
    found = []
    halved = of_rank(choice.shapes, lambda rank: rank // 2 if rank % 2 == 0 else None)
    doubled = of_rank(choice.shapes, lambda rank: 2 * rank)
    if halved is not None:
        found.append(replace(choice, change="half the rank", shapes=halved))
    if doubled is not None:
        found.append(replace(choice, change="twice the rank", shapes=doubled))
    for what in ("rounds", "batch"):
        number = getattr(choice, what)
        if number % 2 == 0:
            found.append(replace(choice, change=f"half the {what}", **{what: number // 2}))
        found.append(replace(choice, change=f"twice the {what}", **{what: 2 * number}))
    return found


def of_rank(
    shapes: Mapping[str, tuple[int, ...]], change: Callable[[int], int | None]
) -> dict[str, tuple[int, ...]] | None:
    """Return `shapes` with the LoRA factors' rank r changed: A is [r, d_in, ...], B is [d_out, r, ...].

    The ranks of layers may differ; heads and magnitudes keep their shape. None if there are no factors, or
    one whose rank cannot be changed.
    """
    factors = {name: 0 if is_lora_a(name) else 1 for name in shapes if is_lora_a(name) or is_lora_b(name)}
    changed = {}
    for name, axis in factors.items():
        shape = shapes[name]
        rank = change(shape[axis])
        if rank is None:
            return None
        changed[name] = (*shape[:axis], rank, *shape[axis + 1 :])
    return {**shapes, **changed} if changed else None


class CrossCheck(UnboundedModel):
    """Epsilon of the same events by independent accountants; infinite where a step had no noise."""

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
