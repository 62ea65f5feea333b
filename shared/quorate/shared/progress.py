"""Progress inside a round, for whoever watches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial


@dataclass(frozen=True)
class StepEvent:
    """One optimiser step of a stack of sites, or one of the passes that it is made of."""

    sites: tuple[str, ...]
    round: int
    step: int
    steps: int
    loss: float | None
    """Mean over the sites' batches; None under differential privacy, where it is nobody's to see."""
    taken: bool = True
    """False after each pass but the last of a step: work can be ended there, and no step has been taken."""


OnStep = Callable[[StepEvent], None]


def between_passes(on_step: OnStep, taken: StepEvent) -> Callable[[], None]:
    """Return what to call between two passes of the step that will end in `taken`."""
    return partial(on_step, replace(taken, taken=False))


def ignore_step(event: StepEvent) -> None:
    """Watch nothing."""
