"""What a private mechanism did to the data, apart from what that costs (after google/dp-accounting).

Events are facts: they are what a site's ledger stores, and any accountant can be asked about them later.
"""

from __future__ import annotations

from pydantic import Field

from quorate.shared.config.config_model import ConfigModel


class PrivacyEvent(ConfigModel):
    """`steps` adaptive compositions of the Poisson-subsampled Gaussian mechanism, add or remove one unit.

    A step takes every unit (a record, a group, a site) with probability `sampling_probability`, independently
    of all others, clips each unit's contribution to L2 norm C, and adds N(0, (noise_multiplier C)^2 I) to the
    sum. Probability 1 is the plain Gaussian mechanism.
    """

    sampling_probability: float = Field(gt=0, le=1)
    """Chance of a unit to take part in a step."""
    noise_multiplier: float = Field(ge=0)
    """Standard deviation of the noise over the clipping norm; 0 is no noise, and an infinite epsilon."""
    steps: int = Field(ge=0)
    """Compositions, empty batches included."""
