"""FFA-LoRA: freeze A at its seeded start; train, upload and average B and the head.

Sun et al. 2024, arXiv:2403.12313. With one A everywhere the mean of the products is the product of the means,
sum p_k B_k A = Bbar A, so averaging is exact, and noise on B enters the product linearly.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

from quorate.shared.adapters.adapter import is_lora_a
from quorate.shared.aggregation.rule import Aggregator


class FFA(Aggregator):
    """Average every array but the A factors, which nobody trains."""

    name: Literal["ffa"] = "ffa"
    """The rule."""
    linear: ClassVar[bool] = True

    def trainable(self, names: Iterable[str], round: int) -> frozenset[str]:
        """Return all arrays but A: [r, d_in] stays at its start in every round."""
        return frozenset(name for name in names if not is_lora_a(name))

    def sent(self, names: Iterable[str], round: int) -> frozenset[str]:
        """Return all arrays but A, which every site draws from the run's seed by itself."""
        return frozenset(name for name in names if not is_lora_a(name))
