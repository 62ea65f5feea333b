"""Lower bound on epsilon from guesses about canaries of one training run.

After Steinke, Nasr and Jagielski 2023, arXiv:2305.08846. Each of m canaries is put into the training data or
left out by a fair coin. An auditor who saw what training gave guesses r of the coins and is right v times.
Under (epsilon, delta)-DP with respect to one canary, guesses are hardly better than those of randomised
response with that epsilon, so many right ones refute small epsilons.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from quorate.shared.config.config_model import ConfigModel

_LARGEST_EPSILON = 100.0
_PRECISION = 1e-6


class Guesses(ConfigModel):
    """How an auditor fared."""

    canaries: int = Field(ge=1)
    """m: canaries with a coin each."""
    made: int = Field(ge=0)
    """r: coins that were guessed; on the others the auditor abstained."""
    right: int = Field(ge=0)
    """v: guesses that were right."""


def p_value(guesses: Guesses, epsilon: float, delta: float) -> float:
    """Return the largest chance that an (epsilon, delta)-DP training gives so many right guesses or more.

    The paper's theorem 5.2: P[Bin(r, q) >= v] with q = e^epsilon / (1 + e^epsilon), and for delta the worst
    share of runs that may behave otherwise, 2 m delta max_i P[v > Bin(r, q) >= v - i] / i.
    """
    from scipy.stats import binom

    m, r, v = guesses.canaries, guesses.made, guesses.right
    q = 1.0 / (1.0 + np.exp(-epsilon))
    pure = float(binom.sf(v - 1, r, q))
    if v == 0 or delta == 0.0:
        return min(1.0, pure)
    below = np.cumsum(binom.pmf(np.arange(v - 1, -1, -1), r, q))
    slack = float(np.max(below / np.arange(1, v + 1)))
    return min(1.0, pure + 2 * m * delta * slack)


def lower_bound(guesses: Guesses, delta: float, confidence: float) -> float:
    """Return the largest epsilon that the guesses refute with this confidence; 0.0 when they refute none.

    Args:
        guesses: what the auditor guessed.
        delta: of the claim.
        confidence: such as 0.95: a training that keeps its claim is refuted with at most 1 - this.
    Raises: ValueError: more right than made, or more made than canaries.
    """
    if not guesses.right <= guesses.made <= guesses.canaries:
        raise ValueError(f"{guesses.right} right of {guesses.made} guesses on {guesses.canaries} canaries")
    error = 1.0 - confidence
    if guesses.made == 0 or p_value(guesses, 0.0, delta) > error:
        return 0.0
    low, high = 0.0, _LARGEST_EPSILON
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(guesses, middle, delta) <= error else (low, middle)
    return low


def guess(scores: NDArray[np.float64], included: NDArray[np.bool_], made: int) -> Guesses:
    """Guess "in" for the highest scores and "out" for the lowest, `made` in all, half of each.

    Args:
        scores: [m], higher where a canary looks more like a training row.
        included: [m], the coins.
        made: r, to be chosen before the scores are seen; an odd one guesses "in" once more.
    """
    if not 0 <= made <= len(scores):
        raise ValueError(f"{made} guesses on {len(scores)} canaries")
    order = np.argsort(scores, kind="stable")
    outs = order[: made // 2]
    ins = order[len(order) - (made - made // 2) :] if made else order[:0]
    right = int(included[ins].sum()) + int((~included[outs]).sum())
    return Guesses(canaries=len(scores), made=made, right=right)
