"""What a site says, before a run, that it will do for the privacy of its units."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quorate.shared.config.config_model import ConfigModel
from quorate.shared.privacy.rounding import at_most, delta_shown


class PrivacyClaim(ConfigModel):
    """(epsilon, delta) of the whole run for one unit replaced by an empty one, and what it follows from.

    That is adding or removing a unit while their number stays: noise, sampling probability and steps follow
    from the exact number of units, which is public. It covers what training on the site's training rows gives
    away; figures on validation and test rows are exact and outside of the claim.
    """

    unit: Literal["record", "group"]
    """What one difference between neighbouring data sets is: one of these is replaced by an empty one."""
    units: int = Field(ge=1, le=2**53)
    """Units among the training rows; taken as public."""
    epsilon: float = Field(ge=0)
    """Bound on the privacy loss, over all rounds."""
    delta: float = Field(gt=0, lt=1)
    """Probability with which the bound may fail."""
    accountant: Literal["PLD"] = "PLD"
    """How epsilon was computed: privacy loss distributions (arXiv:1906.00868)."""
    noise_multiplier: float = Field(gt=0)
    """Standard deviation of the noise over the clipping norm."""
    sampling_probability: float = Field(gt=0, le=1)
    """Chance of a unit to be in a step's batch, by Poisson sampling."""
    steps: int = Field(ge=1, le=2**53)
    """Steps over all rounds."""
    clipping_norm: float = Field(gt=0)
    """L2 norm to which a unit's gradient is clipped."""

    @property
    def sentence(self) -> str:
        """The claim in words, for logs and reports."""
        return (
            f"({at_most(self.epsilon)}, {delta_shown(self.delta)})-differential privacy for each of "
            f"{self.units} {self.unit}s, against an empty one in its place: {self.steps} steps at sampling "
            f"probability {self.sampling_probability:.3g}, noise multiplier {self.noise_multiplier:.3g}, "
            f"clipping norm {self.clipping_norm:g}"
        )
