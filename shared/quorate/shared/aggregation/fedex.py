"""FedEx-LoRA: average A and B, and add what the average misses to the frozen base.

Singhal et al. 2024, arXiv:2410.09432. The federation's ideal update is the mean of the products; averaging
the factors misses  sum p_k B_k A_k - Bbar Abar = sum p_k (B_k - Bbar)(A_k - Abar),  of rank <= (K - 1) r.
The residual of all rounds so far is kept as unscaled factors (see GlobalState), recompressed every round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np

from quorate.shared.adapters.adapter import LORA_A, LORA_B, Adapter, is_lora_a, is_lora_b, lora_layers
from quorate.shared.aggregation.factors import Matrix, compress
from quorate.shared.aggregation.rule import (
    RESIDUAL_A,
    RESIDUAL_B,
    Accumulator,
    Aggregator,
    GlobalState,
    RoundNotes,
    WeightedSum,
)
from quorate.shared.errors import AdapterError
from quorate.shared.protocol.phases import Phase


@dataclass
class FactorStack(Accumulator):
    """A running sum of all arrays, and every site's LoRA factors as they came.

    Args:
        state: before the round.
    """

    state: GlobalState
    total: WeightedSum = field(default_factory=WeightedSum)
    factors: list[tuple[float, Adapter]] = field(default_factory=list)

    def add(self, site: str, update: Adapter, weight: float) -> None:
        """Add `weight` times `update`, and keep its factors."""
        self.total.add(update, weight)
        self.factors.append((weight, update.subset(n for n in update if is_lora_a(n) or is_lora_b(n))))

    def finish(self) -> tuple[GlobalState, RoundNotes]:
        """Return the averaged arrays, with this round's residual added to the old one.

        Raises: AdapterError: a factor is not a matrix, or no weight is above 0.
        """
        mean, residual = self.total.mean(), dict(self.state.residual)
        for layer in lora_layers(mean):
            sites = [(weight / self.total.weight, *_pair(u, layer)) for weight, u in self.factors]
            known = layer + RESIDUAL_B in residual
            old = _pair(self.state.residual, layer, RESIDUAL_B, RESIDUAL_A) if known else None
            left, right = residual_factors(sites, old)
            residual[layer + RESIDUAL_B] = left.astype(np.float32)
            residual[layer + RESIDUAL_A] = right.astype(np.float32)
        kept = Adapter({name: array for name, array in residual.items() if array.size})
        adapter = self.state.adapter.updated(mean)
        return replace(self.state, adapter=adapter, residual=kept), RoundNotes()


class FedEx(Aggregator):
    """Average every array, and move the rest of the mean product into the base."""

    name: Literal["fedex"] = "fedex"
    """The rule."""
    linear: ClassVar[bool] = False
    changes_base: ClassVar[bool] = True

    def check_compatible(self, *, use_dora: bool) -> None:
        """Raise ValueError for DoRA."""
        if use_dora:
            raise ValueError(
                "aggregation fedex adds B A products to the base weights, but DoRA rescales base and product "
                "by a trained magnitude, so the result would not be the mean of the sites' models; "
                "set adapter.use_dora: false or choose aggregation fedavg"
            )

    def residual_rank(self, r: int, rounds: int, cohort: int | None) -> int | None:
        """Return (K - 1) r for each round so far, where the run says how many sites a round has at most."""
        if not rounds:
            return 0
        return None if cohort is None else rounds * (cohort - 1) * r

    def init(self, state: GlobalState, round: int, phase: Phase = "fit") -> Accumulator:
        """Start an empty stack. It holds float64 sums, and a float32 copy of every site's factors.

        `finish` needs a few times 8 (m + n) (cohort r + q) bytes besides, for one layer after the other, q
        being the rank of the residual so far.
        """
        return FactorStack(state)


def residual_factors(
    sites: Sequence[tuple[float, Matrix, Matrix]], old: tuple[Matrix, Matrix] | None = None
) -> tuple[Matrix, Matrix]:
    """Return factors of `old` + sum p_k B_k A_k - Bbar Abar, all in float64 and without forming a product.

    Args:
        sites: (p_k, B_k [m, r], A_k [r, n]) of every site; the p_k sum to 1.
        old: the residual so far, [m, q] and [q, n].
    Returns: left [m, q'] and right [q', n], q' at most min(m, n, q + (K - 1) r); 0 where sites agree.
    """
    mean_b = sum(share * b for share, b, _ in sites)
    mean_a = sum(share * a for share, _, a in sites)
    left = [share * (b - mean_b) for share, b, _ in sites]
    right = [a - mean_a for _, _, a in sites]
    # Where sites agree, the differences are rounding errors of B and A themselves: measure noise by those.
    size = sum(share * float(np.linalg.norm(b)) * float(np.linalg.norm(a)) for share, b, a in sites)
    if old is not None:
        left, right = [old[0], *left], [old[1], *right]
    return compress(np.hstack(left), np.vstack(right), floor=float(np.finfo(np.float64).eps) * size)


def _pair(arrays: Adapter, layer: str, b: str = LORA_B, a: str = LORA_A) -> tuple[Matrix, Matrix]:
    """Return a layer's two factors in float64."""
    pair = arrays[layer + b].astype(np.float64), arrays[layer + a].astype(np.float64)
    if pair[0].ndim != 2 or pair[1].ndim != 2:
        message = f"layer {layer} is not a linear layer, which fedex needs; choose aggregation fedavg."
        raise AdapterError(message, kind="not-linear")
    return pair
