"""95 % intervals of metrics, from counts over what is independent: rows, or sentences of many entities.

Every metric here is a mean of ratios: accuracy is right rows over rows, F1 is 2 right / (2 right + wrong +
missed), macro-F1 the mean of these over classes. With c_i what unit i counts, above and below the line are
sums over units of a.c_i and b.c_i, so to first order (Cochran 1977, "Sampling Techniques", 3rd ed., ch. 6)

    ratio = A / B,    variance = sum_i (a.c_i - ratio b.c_i)^2 / B^2

and that takes no more than the sums of c_i and of their products. Two units are added that are all right and
two that are all wrong (for 95 %; Agresti and Coull 1998, doi:10.1080/00031305.1998.10480550): the first order
alone says of 20 right among 20 that nothing else is possible. For accuracy this is their interval itself.
docs/decisions/047-intervals-by-coverage.md has what it covers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_Z = 1.959963984540054
"""97.5th percentile of the normal distribution."""
_FEWEST = 12
"""Units per ratio below which a mean of several has no interval: the rate of a class with few rows is too far
from normal, see docs/decisions/047-intervals-by-coverage.md."""
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class UnitCounts:
    """What independent units count.

    Args:
        totals: sums over units, [d].
        products: sums over units of products of two counts, [d, d]; [d] where each unit counts one thing
            once, so that a product of two different counts is 0.
    """

    totals: Array
    products: Array

    def squares(self, of: Array) -> float:
        """Return the sum over units of (of . counts)^2."""
        if self.products.ndim == 1:
            return float(self.products @ of**2)
        return max(float(of @ self.products @ of), 0.0)


@dataclass(frozen=True)
class MeanOfRatios:
    """A metric: the mean over k of (above_k . totals) / (below_k . totals).

    Args:
        above: [k, d].
        below: [k, d]; ratios whose line has nothing below it do not enter the mean.
    """

    above: Array
    below: Array


@dataclass(frozen=True)
class Estimate:
    """A metric with its spread.

    Args:
        value: in [0, 1].
        variance: to first order.
        units: how many units of equal weight are worth what there is (Kish's effective sample size).
        ratios: how many it is the mean of.
    """

    value: float
    variance: float
    units: float
    ratios: int = 1

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval, within [0, 1], which holds the value; None where there are too few units."""
        if self.ratios > 1 and self.units < _FEWEST * self.ratios:
            return None
        added = _Z**2
        units = self.units + added
        centre = (self.units * self.value + added / 2) / units
        squares = self.units**2 * self.variance + self.units * (self.value - centre) ** 2
        squares += added / 2 * ((1 - centre) ** 2 + centre**2)
        reach = _Z * math.sqrt(squares) / units
        low, high = max(0.0, centre - reach), min(1.0, centre + reach)
        return min(low, self.value), max(high, self.value)


def estimate(metric: MeanOfRatios, counts: UnitCounts) -> Estimate | None:
    """Estimate a metric; None where there is nothing below any line."""
    lines = metric.below @ counts.totals
    present = lines > 0
    if not present.any():
        return None
    above, below, lines = metric.above[present], metric.below[present], lines[present]
    ratios = (above @ counts.totals) / lines
    each = len(lines) * lines
    slopes = ((above - ratios[:, None] * below) / each[:, None]).sum(axis=0)
    weights = (below / each[:, None]).sum(axis=0)
    return Estimate(float(ratios.mean()), counts.squares(slopes), 1 / counts.squares(weights), len(lines))


def difference(one: Estimate, other: Estimate) -> tuple[float, float] | None:
    """Return the 95 % interval of one value less the other; None where one of them has none.

    The two are taken for independent.

    Source: Newcombe 1998, doi:10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I, method 10,
    with the intervals above in place of Wilson's.
    """
    ours, theirs = one.interval, other.interval
    if ours is None or theirs is None:
        return None
    (low, high), (their_low, their_high) = ours, theirs
    gain = one.value - other.value
    return (
        gain - math.hypot(one.value - low, their_high - other.value),
        gain + math.hypot(high - one.value, other.value - their_low),
    )
