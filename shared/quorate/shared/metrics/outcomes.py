"""What a site says about an evaluation: how often each outcome occurred, never a row.

An outcome is a short tuple of integers that a task defines, for single-label classification
(true class, predicted class); there is one per row, or per token, entity or box. Counts of outcomes add up
over sites, and all of a task's metrics follow from them. Where a row has several outcomes, sums of products
of a row's counts may say how they hang together.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from quorate.shared.config.config_model import ConfigModel


class Outcomes(ConfigModel):
    """Counts of distinct outcomes over a set of rows, and sums over these rows."""

    values: tuple[tuple[int, ...], ...] = ()
    """Distinct outcomes, sorted; all of one width."""
    counts: tuple[int, ...] = ()
    """How often each occurred."""
    loss_sum: float = 0.0
    """Loss summed over rows, or tokens [nats]."""
    num_rows: int | None = Field(None, ge=0)
    """Rows measured, where outcomes are not one per row."""
    sums: dict[str, float] = {}
    """Further figures that add up over rows and sites."""

    @model_validator(mode="after")
    def _consistent(self) -> Outcomes:
        if len(self.values) != len(self.counts) or any(count < 0 for count in self.counts):
            raise ValueError("outcomes need one count of at least 0 per value")
        if len({len(value) for value in self.values}) > 1:
            raise ValueError("outcomes are not all of one width")
        return self

    @property
    def units(self) -> int:
        """Number of outcomes: rows, tokens, entities or boxes."""
        return sum(self.counts)

    @property
    def rows(self) -> int:
        """Number of rows measured."""
        return self.units if self.num_rows is None else self.num_rows

    @classmethod
    def of_rows(
        cls,
        rows: npt.NDArray[np.int64],
        loss_sum: float,
        num_rows: int | None = None,
        sums: dict[str, float] | None = None,
    ) -> Outcomes:
        """Count outcomes [n, width]; `num_rows` where they are not one per row."""
        values, counts = np.unique(rows, axis=0, return_counts=True) if len(rows) else (rows, rows)
        return cls(
            values=tuple(map(tuple, values.tolist())),
            counts=tuple(counts.tolist()),
            loss_sum=loss_sum,
            num_rows=None if num_rows == sum(counts.tolist()) else num_rows,
            sums=sums or {},
        )

    @classmethod
    def pooled(cls, parts: Iterable[Outcomes]) -> Outcomes:
        """Add up the outcomes of several sites."""
        total: dict[tuple[int, ...], int] = {}
        loss, rows = 0.0, 0
        sums: dict[str, float] = {}
        for part in parts:
            loss, rows = loss + part.loss_sum, rows + part.rows
            for name, value in part.sums.items():
                sums[name] = sums.get(name, 0.0) + value
            for outcome, count in zip(part.values, part.counts, strict=True):
                total[outcome] = total.get(outcome, 0) + count
        values = tuple(sorted(total))
        counts = tuple(total[value] for value in values)
        return cls(
            values=values,
            counts=counts,
            loss_sum=loss,
            num_rows=None if rows == sum(counts) else rows,
            sums=sums,
        )

    def arrays(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return values [outcomes, width] and counts [outcomes]."""
        return np.array(self.values, dtype=np.int64), np.array(self.counts, dtype=np.int64)
