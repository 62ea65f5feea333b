"""Which round is the best so far, and whether it is time to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from quorate.server.rounds.evaluation import scalars
from quorate.server.tracking.records import Evaluation
from quorate.shared.config.run_config import RunConfig


@dataclass(frozen=True)
class BestRound:
    """The best round so far.

    Args:
        round: the best round by the run's metric on pooled validation rows; None before any was measured.
        value: its value.
        without: evaluated rounds in a row that did not improve on the best one before them.
        sites: site -> (value, validation rows) in the best round.
    """

    round: int | None = None
    value: float | None = None
    without: int = 0
    sites: Mapping[str, tuple[float, int]] = field(default_factory=dict)

    def after(self, config: RunConfig, round: int, validation: Evaluation | None) -> BestRound:
        """Return the standing after `round`; ties go to the earlier round.

        A round without validation figures changes nothing, nor does one that shares no measured site with the
        best. An improvement counts as one for early stopping where it is larger than
        `early_stopping_threshold`, as in transformers' EarlyStoppingCallback.
        """
        metric = config.metric
        value = scalars(validation.pooled).get(metric) if validation else None
        if value is None or validation is None:
            return self
        if math.isnan(value):
            return replace(self, without=self.without + 1)
        sites = _by_site(validation, metric)
        if self.value is None:
            return BestRound(round, value, sites=sites)
        difference = self._difference(value, sites)
        if difference is None:
            return self
        gain = config.task.sign(metric) * difference
        without = 0 if gain > config.evaluation.early_stopping_threshold else self.without + 1
        return BestRound(round, value, without, sites) if gain > 0 else replace(self, without=without)

    def _difference(self, value: float, sites: Mapping[str, tuple[float, int]]) -> float | None:
        """Return how far a round's value lies above the best one's, like compared with like.

        Where the same sites were measured, by the pooled values. Where one was away in either round, pooled
        values are of other rows: then by the means, weighted by rows, over the sites measured in both.
        """
        assert self.value is not None  # `after`
        if sites.keys() == self.sites.keys() or not self.sites:
            return value - self.value
        common = sorted(sites.keys() & self.sites.keys())
        if not common:
            return None
        now, before = ([each[site][0] for site in common] for each in (sites, self.sites))
        rows = [sites[site][1] for site in common]
        return sum(n * (a - b) for n, a, b in zip(rows, now, before, strict=True)) / sum(rows)

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


def _by_site(validation: Evaluation, metric: str) -> dict[str, tuple[float, int]]:
    """Return site -> (value, rows) of those whose value is a number."""
    values = {site: scalars(figures).get(metric, math.nan) for site, figures in validation.sites.items()}
    return {s: (value, validation.rows[s]) for s, value in values.items() if math.isfinite(value)}
