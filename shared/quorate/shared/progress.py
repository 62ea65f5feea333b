"""Progress inside a round, for whoever watches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StepEvent:
    """One optimiser step of a stack of sites."""

    sites: tuple[str, ...]
    round: int
    step: int
    steps: int
    loss: float | None
    """Mean over the sites' batches; None under differential privacy, where it is nobody's to see."""


OnStep = Callable[[StepEvent], None]


def ignore_step(event: StepEvent) -> None:
    """Watch nothing."""
