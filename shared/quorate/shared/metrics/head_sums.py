"""The sums over a site's rows from which a linear head is solved, and which say nothing else of them.

With x a row's features and a constant 1 behind them, y what the head is to come near to, w the row's weight:

    gram     sum of w x x^T    [features + 1, features + 1]
    cross    sum of w x y^T    [features + 1, outputs]
    squares  sum of w y^2      [outputs]

Sums over all sites' rows are the sums of the sites' sums: whoever is added or left out is so exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from quorate.shared.errors import ProtocolError

Doubles = npt.NDArray[np.float64]
SummedSplit = Literal["train", "validation"]
SUMMED: tuple[SummedSplit, ...] = ("train", "validation")
"""Splits whose sums a site sends: to solve from, and to pick the strength of the ridge by."""
_ROUNDING = 1e-9
"""Relative error of sums in float64, with room to spare."""
_SOLVING = 1e-5
"""Relative error of what is solved from them, where features hardly move."""
_LARGEST = 1e100
"""No sum over rows comes near to it; what is made of smaller ones stays finite."""


@dataclass(frozen=True)
class HeadSums:
    """Sums over rows; see above."""

    gram: Doubles
    cross: Doubles
    squares: Doubles

    @classmethod
    def zeros(cls, features: int, outputs: int) -> Self:
        """Return the sums over no rows."""
        return cls(
            np.zeros((features + 1, features + 1)), np.zeros((features + 1, outputs)), np.zeros(outputs)
        )

    @classmethod
    def of(cls, features: npt.NDArray[Any], targets: Doubles, weights: Doubles) -> Self:
        """Return the sums over rows.

        Args:
            features: [rows, features].
            targets: [rows, outputs].
            weights: [rows].
        """
        x = np.hstack([features, np.ones((len(features), 1))]).astype(np.float64)
        weighed = x * weights[:, None]
        gram = weighed.T @ x
        return cls((gram + gram.T) / 2, weighed.T @ targets, weights @ targets**2)

    @classmethod
    def read(cls, arrays: Mapping[str, npt.NDArray[Any]], split: SummedSplit) -> Self:
        """Return what `arrays` put down for a split."""
        return cls(*(arrays[f"{split}.{name}"] for name in ("gram", "cross", "squares")))

    def __add__(self, other: HeadSums) -> HeadSums:
        return HeadSums(self.gram + other.gram, self.cross + other.cross, self.squares + other.squares)

    def scaled(self, factor: float) -> HeadSums:
        """Return the sums over the same rows, each of which weighs `factor` times as much."""
        return HeadSums(factor * self.gram, factor * self.cross, factor * self.squares)

    @property
    def weight(self) -> float:
        """Sum of the rows' weights."""
        return float(self.gram[-1, -1])

    def arrays(self, split: SummedSplit) -> dict[str, Doubles]:
        """Return them under the names by which they are sent."""
        return {f"{split}.gram": self.gram, f"{split}.cross": self.cross, f"{split}.squares": self.squares}

    def check(self, lightest: float, heaviest: float) -> None:
        """Raise ProtocolError unless rows of so much weight in all can have these sums.

        Args:
            lightest: smallest sum of their weights.
            heaviest: largest.
        """
        if not np.array_equal(self.gram, self.gram.T):
            raise ProtocolError("sent sums of products that are not symmetric.", kind="sums-not-symmetric")
        if not lightest * (1 - _ROUNDING) <= self.weight <= heaviest * (1 + _ROUNDING):
            raise ProtocolError(
                f"sent sums over rows of weight {self.weight:.6g}; its rows weigh {lightest:.6g} to "
                f"{heaviest:.6g}.",
                kind="sums-of-other-weight",
            )
        diagonal = np.diag(self.gram)
        with np.errstate(over="ignore"):
            largest = float(diagonal.sum()) + float(self.squares.sum())
        if min(diagonal.min(), self.squares.min()) < 0 or not largest < _LARGEST:
            raise ProtocolError(
                "sent sums of squares that are negative, or larger than those of any features.",
                kind="sums-of-squares",
            )
        bound = np.outer(np.sqrt(diagonal), np.sqrt(self.squares))  # by Cauchy and Schwarz
        if not (np.abs(self.cross) <= bound + _ROUNDING * bound.max()).all():
            raise ProtocolError(
                "sent sums of products of features and targets that no rows have.", kind="sums-with-targets"
            )
        explained = _explained(self.gram, self.cross)
        if explained is None:
            raise ProtocolError(
                "sent sums of products of features that no rows have.", kind="sums-of-features"
            )
        if not (explained <= self.squares * (1 + _SOLVING)).all():
            raise ProtocolError(
                "sent sums of products of features and targets that all together no rows have.",
                kind="sums-with-targets",
            )


def sums_schema(features: int, outputs: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the arrays in an answer to `statistics`."""
    nothing = HeadSums.zeros(features, outputs)
    return {name: array.shape for split in SUMMED for name, array in nothing.arrays(split).items()}


def _explained(gram: Doubles, cross: Doubles) -> Doubles | None:
    """Return what of each target's squares its products with features say at least: never more than all.

    None where x^T gram x is below 0 for some x, but for rounding.
    """
    from scipy.linalg import cho_factor, cho_solve

    if not gram.any():
        return np.zeros(cross.shape[1])
    try:
        factor = cho_factor(gram + _ROUNDING * np.trace(gram) * np.eye(len(gram)), lower=True)
    except np.linalg.LinAlgError:
        return None
    explained: Doubles = np.sum(cross * cho_solve(factor, cross), axis=0)
    return explained
