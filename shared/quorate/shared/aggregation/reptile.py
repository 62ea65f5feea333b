"""Reptile: move the global adapter a part of the way to the mean of the sites', for a start that adapts fast.

Nichol, Achiam and Schulman 2018, arXiv:1803.02999, batched version (section 2): with outer step size e the
start phi becomes phi + e mean_k (phi_k - phi), phi_k being what site k trained phi into. It is a start for a
site's own fine-tuning rather than one model for all. The paper anneals e linearly to 0 and weighs tasks
equally (`weighting: uniform`). A step size of 1 is fedavg.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from quorate.shared.adapters.adapter import Adapter, Array
from quorate.shared.aggregation.rule import Aggregator, GlobalState


class Reptile(Aggregator):
    """Average every array, and go a part of the way there."""

    name: Literal["reptile"] = "reptile"
    """The rule."""
    linear: ClassVar[bool] = True

    outer_learning_rate: float = Field(0.5, ge=0, le=1)
    """Part of the way from the global adapter to the sites' mean that a round goes."""
    decay_rounds: int | None = Field(None, ge=1)
    """Lower that part linearly, to reach 0 after so many rounds: the run's number of rounds, as a rule.
    Constant when left out."""

    def rate(self, round: int) -> float:
        """Return the part of the way that `round` (from 1) goes."""
        left = 1.0 if self.decay_rounds is None else max(0.0, 1 - (round - 1) / self.decay_rounds)
        return self.outer_learning_rate * left

    def step(self, state: GlobalState, mean: Adapter, round: int) -> GlobalState:
        """Return the state with every trained array moved; computed in float64."""
        rate, start = self.rate(round), state.adapter

        def moved(name: str, mean: Array) -> Array:
            # Weighted, not start + rate * (mean - start): exact at both ends, 0 and 1.
            step = (1 - rate) * start[name].astype(np.float64) + rate * mean.astype(np.float64)
            return step.astype(np.float32)

        return replace(state, adapter=start.updated(mean.map(moved)))
