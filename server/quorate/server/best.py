"""Which round is the best so far, and whether it is time to stop."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quorate.server.evaluation import scalars
from quorate.server.records import Evaluation
from quorate.shared.config.run import RunConfig


@dataclass(frozen=True)
class Standing:
    """The best round so far.

    Args:
        round: the best round by the run's metric on pooled validation rows; None before any was measured.
        value: its value.
        without: evaluated rounds in a row that did not improve on the best one before them.
    """

    round: int | None = None
    value: float | None = None
    without: int = 0

    def after(self, config: RunConfig, round: int, validation: Evaluation | None) -> Standing:
        """Return the standing after `round`; ties go to the earlier round.

        A round without validation figures changes nothing. An improvement counts as one for early stopping
        where it is larger than `early_stopping_threshold`, as in transformers' EarlyStoppingCallback.
        """
        metric = config.metric
        value = scalars(validation.pooled).get(metric) if validation else None
        if value is None:
            return self
        if math.isnan(value):
            return Standing(self.round, self.value, self.without + 1)
        if self.value is None:
            return Standing(round, value)
        gain = config.task.sign(metric) * (value - self.value)
        without = 0 if gain > config.evaluation.early_stopping_threshold else self.without + 1
        return Standing(round, value, without) if gain > 0 else Standing(self.round, self.value, without)

    def stops(self, config: RunConfig, round: int) -> str | None:
        """Return why no round is to follow `round`, in words; None where the run goes on."""
        patience = config.evaluation.early_stopping_patience
        if patience is None or self.without < patience or round >= config.federation.rounds:
            return None
        rounds = "evaluated round" if self.without == 1 else f"{self.without} evaluated rounds"
        by = config.evaluation.early_stopping_threshold
        more = f" by more than {by:g}" if by else ""
        best = f"round {self.round} ({self.value:.4g})" if self.value is not None else "none, all were NaN"
        return (
            f"stopped early after round {round} of {config.federation.rounds}: for {rounds} "
            f"{config.metric} has not improved{more}; the best is {best}"
        )
