"""FedAvg on LoRA factors (FedIT): average A and B separately.

McMahan et al. 2017, arXiv:1602.05629; applied to LoRA by Zhang et al. 2024, arXiv:2305.05644.
The mean of the factors is not the factor of the mean: sum p_k B_k A_k != Bbar Abar. `fedex` closes the gap.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from quorate.shared.aggregation.rule import Aggregator


class FedAvg(Aggregator):
    """Average every array."""

    name: Literal["fedavg"] = "fedavg"
    """The rule."""
    linear: ClassVar[bool] = True
