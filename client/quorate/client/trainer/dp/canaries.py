"""Canaries: made-up units of a private training, put in by an audit to see whether anyone could tell.

A canary's gradient is one number, far above the clipping norm, in an array and place of its own. It is drawn,
clipped and drowned in noise by the same code as any other unit; its place in the noisy sums then says, well
or badly, whether it took part. Few guesses are better, and differential privacy must withstand all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TIMES_THE_CLIPPING_NORM = 10.0
"""Size of a canary's gradient before it is clipped: without clipping it would stand out ten times more."""


@dataclass
class Canaries:
    """Canaries at one site, some of which are in.

    Args:
        names: the array of each canary, [m].
        places: its index in the flattened array, [m].
        signs: of its gradient, [m].
        included: which of them take part, [m].
        scores: what was seen of each so far, [m]: the sum over steps of the noisy sums at its place, with its
            sign, in clipping norms. It is large for those that take part.
    """

    names: tuple[str, ...]
    places: NDArray[np.int64]
    signs: NDArray[np.float64]
    included: NDArray[np.bool_]
    scores: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.scores = np.zeros(len(self.names))

    @classmethod
    def draw(cls, shapes: Mapping[str, tuple[int, ...]], count: int, draw: np.random.Generator) -> Canaries:
        """Draw places without repetition over all arrays, signs, and a fair coin each.

        Args:
            shapes: of the arrays that move.
            count: m.
        Raises: ValueError: more canaries than numbers.
        """
        sizes = np.array([int(np.prod(shape)) for shape in shapes.values()])
        ends = np.cumsum(sizes)
        if count > ends[-1]:
            raise ValueError(f"{count} canaries in {ends[-1]} numbers")
        chosen = draw.choice(ends[-1], count, replace=False)
        arrays = np.searchsorted(ends, chosen, side="right")
        names = tuple(shapes)
        return cls(
            names=tuple(names[array] for array in arrays),
            places=chosen - (ends - sizes)[arrays],
            signs=draw.choice([-1.0, 1.0], count),
            included=draw.random(count) < 0.5,
        )

    def gradients(
        self, which: NDArray[np.int64], arrays: Mapping[str, Tensor], clipping_norm: float
    ) -> dict[str, Tensor]:
        """Return the gradients of these canaries, name -> [canaries, ...], shaped as `arrays`."""
        found = {name: array.new_zeros(len(which), *array.shape) for name, array in arrays.items()}
        for row, canary in enumerate(which.tolist()):
            size = TIMES_THE_CLIPPING_NORM * clipping_norm * self.signs[canary]
            found[self.names[canary]][row].view(-1)[int(self.places[canary])] = size
        return found

    def observe(self, noisy: Mapping[str, Tensor], clipping_norm: float) -> None:
        """Look at the noisy sum of a step."""
        flat = {name: noisy[name].detach().flatten() for name in set(self.names)}
        seen = torch.stack([flat[n][p] for n, p in zip(self.names, self.places.tolist(), strict=True)])
        self.scores += self.signs * seen.double().cpu().numpy() / clipping_norm
