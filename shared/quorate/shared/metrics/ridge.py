"""A linear head by ridge regression, from sums over rows alone (arXiv:2405.16240).

    coefficients = (G + s m D)^-1 H,   m = trace(G) / (features + 1),   D = diag(1, ..., 1, 0)

The strength s is relative to the mean m of G's diagonal, so that neither the number of rows nor the unit of
the features changes its meaning. The constant is not drawn to zero: it only centres.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from quorate.shared.errors import AdapterError
from quorate.shared.metrics.head_sums import Doubles, HeadSums

STRENGTHS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""Among which validation rows pick."""
STRENGTH = 1e-2
"""Where there are none."""


LEAST_SLOPE = 0.1
"""A head that says nothing on validation rows keeps so much of its scale; training goes on from it."""


@dataclass(frozen=True)
class Solution:
    """A solved head.

    Args:
        coefficients: [features + 1, outputs]; the last row is the bias.
        strength: of the ridge.
        slope: of targets on outputs over validation rows: how much of what the head says there is so; 1 where
            there are none.
    """

    coefficients: Doubles
    strength: float
    slope: float = 1.0

    def head(self, logit_scale: float | None) -> Doubles:
        """Return the coefficients of a head that gives logits (`Task.logit_scale`), or numbers as they are.

        The scale of logits is one temperature for all outputs, lowered by the slope where the head overfits.
        """
        if logit_scale is None:
            return self.coefficients
        return logit_scale * min(max(self.slope, LEAST_SLOPE), 1.0) * self.coefficients


def solve(sums: HeadSums, strength: float) -> Doubles:
    """Return the coefficients [features + 1, outputs] for one strength, by Cholesky's factors.

    Raises: AdapterError: the rows have no weight, or their sums no solution in float64.
    """
    from scipy.linalg import cho_factor, cho_solve

    if not sums.weight > 0:
        raise AdapterError(
            "the head cannot be solved: no row of any site has a weight above 0.", kind="rows-without-weight"
        )
    matrix, size = sums.gram.copy(), len(sums.gram)
    matrix[np.arange(size - 1), np.arange(size - 1)] += strength * float(np.trace(sums.gram)) / size
    try:
        coefficients: Doubles = cho_solve(cho_factor(matrix, lower=True), sums.cross)
    except (np.linalg.LinAlgError, ValueError) as error:
        raise AdapterError(
            f"the head cannot be solved from the sums over rows: {error}.", kind="head-without-solution"
        ) from error
    return coefficients


def squared_error(sums: HeadSums, coefficients: Doubles) -> float:
    """Return the weighed squared errors over rows and outputs: tr C'GC - 2 tr C'H + the targets' squares."""
    predicted = float(np.sum(coefficients * (sums.gram @ coefficients)))
    return predicted - 2 * float(np.sum(coefficients * sums.cross)) + float(sums.squares.sum())


def solve_best(train: HeadSums, validation: HeadSums) -> Solution:
    """Return the solution whose squared error on validation rows is smallest; without such rows, of STRENGTH.

    Raises: AdapterError: as `solve`.
    """
    if not validation.weight > 0:
        return Solution(solve(train, STRENGTH), STRENGTH)
    found = [Solution(solve(train, strength), strength) for strength in STRENGTHS]
    best = min(found, key=lambda each: squared_error(validation, each.coefficients))
    return replace(best, slope=_slope(validation, best.coefficients))


def _slope(sums: HeadSums, coefficients: Doubles) -> float:
    """Return the least-squares slope of targets on outputs, of all outputs together and about their means."""
    outputs, targets = coefficients.T @ sums.gram[:, -1], sums.cross[-1]
    together = float(np.sum(coefficients * sums.cross)) - float(outputs @ targets) / sums.weight
    spread = float(np.sum(coefficients * (sums.gram @ coefficients))) - float(outputs @ outputs) / sums.weight
    return together / spread if spread > 0 else 1.0
