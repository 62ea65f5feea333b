"""Client-level epsilon from one run, by canary sites that send random directions.

After Andrew, Kairouz, Oh, Oprea, McMahan and Suriyakumar 2023, arXiv:2302.03098. A canary's update is a
random unit vector times the clipping norm. Its cosine with what the run released is N(0, 1/d) had it not
taken part; the cosines of those that did are fitted by a Gaussian, and the two are as far apart as some
epsilon allows. It is an estimate, not a bound.

The same cosines give a bound, too, which is ours and blunter. Let S(t) be the chance that a uniformly random
direction has a cosine of t or more with a vector that does not depend on it. Under (epsilon, delta)-DP with
respect to each canary, the cosine of one that took part is t or more with a chance of at most
e^epsilon S(t) + delta, so that is the expected share of such canaries, however they depend on each other.
By Markov half of them reach t with a chance of at most 2 (e^epsilon S(t) + delta); the median says which t
they reached.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_LARGEST_EPSILON = 200.0
_PRECISION = 1e-6
_LARGEST_EXPONENT = 700.0


def canaries(count: int, size: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Return unit vectors of uniformly random direction, [count, size]."""
    drawn = generator.standard_normal((count, size))
    return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True), dtype=np.float64)


def cosines(directions: NDArray[np.float64], released: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the cosine of each canary, [count], with the released vector, [size]."""
    return np.asarray(directions @ released / np.linalg.norm(released), dtype=np.float64)


def estimate(observed: NDArray[np.float64], size: int, delta: float) -> float:
    """Return epsilon-hat from the cosines of canaries that took part.

    Args:
        observed: [count] cosines with the released vector.
        size: d, the number of values of a canary.
        delta: of the claim.
    Raises: ValueError: fewer than two cosines, or all equal.
    """
    if len(observed) < 2 or not observed.std() > 0:
        raise ValueError("a Gaussian is fitted to at least two different cosines")
    mean, deviation = float(observed.mean()), float(observed.std(ddof=1))
    return epsilon_of_gaussians(mean, deviation, 1.0 / math.sqrt(size), delta)


def lower_bound(observed: NDArray[np.float64], size: int, delta: float, confidence: float) -> float:
    """Return the largest epsilon that the median cosine refutes; 0.0 when it refutes none.

    Args:
        observed: [count] cosines with the released vector, of canaries that all took part.
        size: d, the number of values of a canary; 2 or more.
        delta: of the claim; above (1 - confidence) / 2 nothing can be refuted.
        confidence: such as 0.999: a run that keeps its claim is refuted with at most 1 - this.
    """
    left = (1.0 - confidence) / 2 - delta
    chance = chance_of_cosine(float(np.quantile(observed, 0.5, method="lower")), size)
    if left <= chance:
        return 0.0
    return min(_LARGEST_EPSILON, math.log(left) - math.log(chance)) if chance > 0 else _LARGEST_EPSILON


def chance_of_cosine(least: float, size: int) -> float:
    """Return the chance that a uniformly random direction has this cosine or more with a fixed vector.

    The square of the cosine is Beta(1/2, (size - 1) / 2).
    """
    from scipy.special import betainc

    tail = float(betainc((size - 1) / 2, 0.5, 1.0 - min(1.0, least * least))) / 2
    return tail if least > 0 else 1.0 - tail


def epsilon_of_gaussians(mean: float, deviation: float, null_deviation: float, delta: float) -> float:
    """Return the smallest epsilon at which two Gaussians are (epsilon, delta)-indistinguishable, both ways.

    Args:
        mean: of the first; the second's is 0.
        deviation: standard deviation of the first.
        null_deviation: standard deviation of the second.
        delta: of the claim.
    """

    def apart(epsilon: float) -> float:
        return max(
            hockey_stick(epsilon, (mean, deviation), (0.0, null_deviation)),
            hockey_stick(epsilon, (0.0, null_deviation), (mean, deviation)),
        )

    if apart(0.0) <= delta:
        return 0.0
    low, high = 0.0, _LARGEST_EPSILON
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if apart(middle) > delta else (low, middle)
    return high


def hockey_stick(epsilon: float, p: tuple[float, float], q: tuple[float, float]) -> float:
    """Return the integral of max(0, P - e^epsilon Q) for Gaussians given as (mean, standard deviation).

    log P - log Q - epsilon is a parabola, so the set where it is positive is an interval or what lies outside
    one, and the integral follows from the two distribution functions at its roots.
    """
    (m, s), (n, t) = p, q
    a = 0.5 * (1 / t**2 - 1 / s**2)
    b = m / s**2 - n / t**2
    c = 0.5 * (n**2 / t**2 - m**2 / s**2) + math.log(t / s) - epsilon

    def mass(low: float, high: float) -> float:
        return _between(low, high, m, s, 0.0) - _between(low, high, n, t, epsilon)

    if abs(a) < 1e-12 * max(1.0, abs(b)):
        if b == 0.0:
            return max(0.0, 1.0 - math.exp(epsilon))
        root = -c / b
        return max(0.0, mass(root, math.inf) if b > 0 else mass(-math.inf, root))
    square = b * b - 4 * a * c
    if square <= 0:  # one of the two is larger everywhere
        return max(0.0, 1.0 - math.exp(epsilon)) if a > 0 else 0.0
    # The stable form of the two roots.
    far = -0.5 * (b + math.copysign(math.sqrt(square), b))
    low, high = sorted((far / a, c / far))
    if a < 0:
        return max(0.0, mass(low, high))
    return max(0.0, mass(-math.inf, low) + mass(high, math.inf))


def _between(low: float, high: float, mean: float, deviation: float, log_factor: float) -> float:
    """Return e^log_factor P[low < N(mean, deviation^2) < high], from the tail in which that cancels less."""
    from scipy.stats import norm

    tail, far, near = (norm.logsf, high, low) if low > mean else (norm.logcdf, low, high)
    larger, smaller = tail(near, mean, deviation) + log_factor, tail(far, mean, deviation) + log_factor
    return math.exp(min(larger, _LARGEST_EXPONENT)) - math.exp(min(smaller, _LARGEST_EXPONENT))
