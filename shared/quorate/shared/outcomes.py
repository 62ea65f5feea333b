"""What a site says about an evaluation: how often each outcome occurred, never a row.

An outcome is a short tuple of integers that a task defines, for single-label classification
(true class, predicted class). Counts of outcomes add up over sites, all of a task's metrics follow from
them, and resampling test rows with replacement is a multinomial draw over the counts.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from pydantic import model_validator

from quorate.shared.config.base import ConfigModel


class Outcomes(ConfigModel):
    """Counts of distinct outcomes over a set of rows, and the rows' summed loss."""

    values: tuple[tuple[int, ...], ...] = ()
    """Distinct outcomes, sorted; all of one width."""
    counts: tuple[int, ...] = ()
    """Rows with each outcome."""
    loss_sum: float = 0.0
    """Loss summed over rows [nats]."""

    @model_validator(mode="after")
    def _consistent(self) -> Outcomes:
        if len(self.values) != len(self.counts) or any(count < 0 for count in self.counts):
            raise ValueError("outcomes need one count of at least 0 per value")
        if len({len(value) for value in self.values}) > 1:
            raise ValueError("outcomes are not all of one width")
        return self

    @property
    def rows(self) -> int:
        """Number of rows counted."""
        return sum(self.counts)

    @classmethod
    def of_rows(cls, rows: npt.NDArray[np.int64], loss_sum: float) -> Outcomes:
        """Count the outcomes of `rows` [rows, width]."""
        if not len(rows):
            return cls(loss_sum=loss_sum)
        values, counts = np.unique(rows, axis=0, return_counts=True)
        return cls(
            values=tuple(map(tuple, values.tolist())), counts=tuple(counts.tolist()), loss_sum=loss_sum
        )

    @classmethod
    def pooled(cls, parts: Iterable[Outcomes]) -> Outcomes:
        """Add up the outcomes of several sites."""
        total: dict[tuple[int, ...], int] = {}
        loss = 0.0
        for part in parts:
            loss += part.loss_sum
            for value, count in zip(part.values, part.counts, strict=True):
                total[value] = total.get(value, 0) + count
        values = tuple(sorted(total))
        return cls(values=values, counts=tuple(total[value] for value in values), loss_sum=loss)

    def resampled(self, rng: np.random.Generator) -> Outcomes:
        """Return one bootstrap sample of the rows, drawn with replacement; the loss sum is kept."""
        counts = rng.multinomial(self.rows, np.array(self.counts) / self.rows)
        # Not validated again: a bootstrap makes thousands of these from values that were.
        return self.model_copy(update={"counts": tuple(counts.tolist())})

    def arrays(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return values [outcomes, width] and counts [outcomes]."""
        return np.array(self.values, dtype=np.int64), np.array(self.counts, dtype=np.int64)
