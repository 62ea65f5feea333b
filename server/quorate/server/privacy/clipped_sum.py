"""Step 6 of a round: the sum of clipped updates, and noise on it (DP-FedAvg, arXiv:1710.06963).

Whatever one site sends moves the sum by at most the clipping norm C, and the count of norms up to C by at
most 1/2. With Gaussian noise on both, that is all a round tells of a site:

    mean      start + (sum_k clip(x_k - start, C) + N(0, (z' C)^2 I)) / K
    fraction  1/2 + (sum_k (1[|x_k - start| <= C] - 1/2) + N(0, sigma_b^2)) / K
    C         <- C exp(-0.2 (fraction - quantile))                       (adaptive clipping, arXiv:1905.03871)

K is the cohort's *expected* size: the true one depends on who was drawn and who answered. Norms are over all
arrays that move, concatenated; sums are float64. Noise is drawn by the system's entropy, never by the run's
seed, which every site knows. It is floating-point noise: what a float's last bits may tell
(Mironov 2012, doi:10.1145/2382196.2382264) is not ruled out, and rounding the mean to float32 only blurs it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from quorate.shared.adapters.adapter import Adapter
from quorate.shared.privacy.secure_random import SecretSource

CLIPPING_RATE = 0.2
"""How fast the clipping norm follows the quantile (eta_C of arXiv:1905.03871, section 3)."""


@dataclass
class ClippedSum:
    """A running sum of clipped updates, in the memory of one of them (float64).

    Args:
        start: what the sites were sent; updates are clipped as differences to it.
        names: the arrays that move.
        clipping_norm: C [parameter units].
    """

    start: Adapter
    names: Iterable[str]
    clipping_norm: float
    sums: dict[str, npt.NDArray[np.float64]] = field(init=False)
    """Sum of clipped differences, by array."""
    within: float = field(init=False, default=0.0)
    """Sum over updates of 1/2 for a norm up to C, and of -1/2 for a larger one."""

    def __post_init__(self) -> None:
        self.start = self.start.subset(self.names)
        self.sums = {name: np.zeros(array.shape) for name, array in self.start.items()}

    @property
    def size(self) -> int:
        return sum(array.size for array in self.sums.values())

    def add(self, update: Adapter) -> None:
        """Add one site's update, clipped. One with NaN or infinity adds nothing, as if it had not come."""
        moved = {name: np.subtract(update[name], self.start[name], dtype=np.float64) for name in self.sums}
        norm = math.sqrt(sum(float(np.vdot(each, each)) for each in moved.values()))
        if not math.isfinite(norm):
            return
        self.within += 0.5 if norm <= self.clipping_norm else -0.5
        # Without the guard a site that has not moved would be divided by zero.
        factor = self.clipping_norm / norm if norm > self.clipping_norm else 1.0
        for name, total in self.sums.items():
            total += factor * moved[name]

    def noised_mean(self, noise_multiplier: float, expected: float, source: SecretSource) -> Adapter:
        """Return start plus the noised sum over `expected` updates, rounded to float32.

        Args:
            noise_multiplier: z', standard deviation of the noise over the clipping norm.
            expected: K.
        """
        deviation = noise_multiplier * self.clipping_norm

        def noised(name: str, start: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            noise = deviation * source.normal(start.size).reshape(start.shape)
            return (start + (self.sums[name] + noise) / expected).astype(np.float32)

        return self.start.map(noised)

    def noised_fraction(self, deviation: float, expected: float, source: SecretSource) -> float:
        """Return the noised part of updates whose norm was up to C; noise may take it out of [0, 1].

        Args:
            deviation: sigma_b, standard deviation of the noise on the count.
            expected: K.
        """
        return 0.5 + (self.within + deviation * float(source.normal(1)[0])) / expected


def next_norm(norm: float, fraction: float, quantile: float) -> float:
    """Return the clipping norm of the next round.

    It shrinks where more than `quantile` of the norms lay within it, and grows where fewer did.
    """
    return norm * math.exp(-CLIPPING_RATE * (fraction - quantile))
