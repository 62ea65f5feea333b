"""Clip each unit's gradient and add them up: the part of DP-SGD that bounds what one unit can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quorate.client.trainer.dp.noise import with_noise
from quorate.shared.privacy.secure_random import SecretSource

_ABOVE_ZERO = 1e-6
"""Added to a norm before it divides, as in Opacus: rounding then leaves a clipped norm below its bound."""


class ClippedGradientSum:
    """The sum over a batch's units of their clipped gradients; it moves by at most C for one unit.

    Args:
        shapes: of every trained array; their norm is taken over all of them together.
        clipping_norm: C.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], clipping_norm: float, device: torch.device
    ) -> None:
        self.clipping_norm = clipping_norm
        self.total = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        self._open: dict[str, Tensor] | None = None

    def add(self, gradients: Mapping[str, Tensor], units: Sequence[int], *, goes_on: bool = False) -> None:
        """Add rows' gradients.

        Args:
            gradients: name -> [rows, ...].
            units: the unit of each row; rows of one unit stand together.
            goes_on: the last unit has more rows, which are the first ones of the next call.
        """
        distinct = list(dict.fromkeys(units))
        of_units = dict(gradients)
        if len(distinct) < len(units):
            place = torch.tensor([distinct.index(unit) for unit in units])
            of_units = {
                name: g.new_zeros(len(distinct), *g.shape[1:]).index_add_(0, place.to(g.device), g)
                for name, g in gradients.items()
            }
        if self._open is not None:
            of_units = {
                name: torch.cat([(g[0] + self._open[name])[None], g[1:]]) for name, g in of_units.items()
            }
            self._open = None
        if goes_on:
            self._open = {name: g[-1] for name, g in of_units.items()}
            of_units = {name: g[:-1] for name, g in of_units.items()}
        self._clip(of_units)

    def _clip(self, gradients: Mapping[str, Tensor]) -> None:
        """Clip units' gradients, name -> [units, ...], and add them to the total."""
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients.values()])
        norm = torch.linalg.vector_norm(norms, dim=0)
        factor = (self.clipping_norm / (norm + _ABOVE_ZERO)).clamp(max=1.0)
        finite = norm.isfinite()
        if not finite.all():
            # NaN and infinity have no direction to clip to: such a unit adds nothing, which is within C too.
            gradients = {name: g[finite] for name, g in gradients.items()}
            factor = factor[finite]
        for name, gradient in gradients.items():
            self.total[name] += torch.tensordot(factor, gradient, dims=1)

    def noised(self, source: SecretSource, noise_multiplier: float) -> dict[str, Tensor]:
        """Return the sum with Gaussian noise of standard deviation noise_multiplier * C on every number."""
        assert self._open is None, "the last unit's rows are all there"
        std = noise_multiplier * self.clipping_norm
        return {name: with_noise(source, total, std) for name, total in self.total.items()}
