"""Gradients of each row for DP-SGD, kept where a stacked layer is differentiated.

In place of a layer's weight gradient, which is a sum over rows, the backward pass of these Functions keeps
one gradient per row and returns the gradient of the input as usual: one backward pass, no hooks. The forward
pass leaves nothing behind, so both kinds of gradient checkpointing may repeat it. A layer that is used
several times has its gradients added up.

Rows are the slowest axis of every activation ([k * b, ...], also where windows or heads are folded into it);
`quorate.client.trainer.dp.row_isolation` proves that on the model at hand before anything is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quorate.shared.errors import ModelError


class PerSample:
    """The gradients of one backward pass.

    Args:
        rows: b, the rows of each site in the batch, padding included.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._kept: dict[int, Tensor] = {}

    def add(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        """Add gradients [k, b, ...] of a parameter [K, ...] for the batch's k sites."""
        gradients = gradients.to(parameter.dtype)
        before = self._kept.get(id(parameter))
        self._kept[id(parameter)] = gradients if before is None else before + gradients

    def of_site(self, arrays: Mapping[str, nn.Parameter], at: int, rows: int) -> dict[str, Tensor]:
        """Return the gradients of the batch's `at`-th site's real rows, name -> [rows, ...].

        A trained array that took no part in the pass has gradients of zero.
        """
        found = {}
        for name, array in arrays.items():
            if array.requires_grad:
                kept = self._kept.get(id(array))
                found[name] = array.new_zeros(rows, *array.shape[1:]) if kept is None else kept[at, :rows]
        return found


def linear(
    kept: PerSample, x: Tensor, weight: Tensor, bias: Tensor | None, of: tuple[nn.Parameter, ...]
) -> Tensor:
    """Return x [k, n, d_in] through weight [k, d_out, d_in] and bias [k, d_out]; n is a multiple of b."""
    _check_rows(x.shape[1], kept.rows)
    found: Tensor = _Linear.apply(x, weight, bias, kept, of)  # type: ignore[no-untyped-call]
    return found


def convolution(
    kept: PerSample,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    of: tuple[nn.Parameter, ...],
    geometry: Mapping[str, Any],
) -> Tensor:
    """Return images x [k * b, c_in, h, w] through weight [k, c_out, c_in / groups, kh, kw], bias [k, c_out].

    Args:
        kept: takes the gradients.
        of: the parameters that weight and bias are slices of.
        geometry: stride, padding, dilation and groups of the convolution.
    """
    _check_rows(x.shape[0] // weight.shape[0], kept.rows)
    found: Tensor = _Convolution.apply(x, weight, bias, kept, of, geometry)  # type: ignore[no-untyped-call]
    return found


def scaled(kept: PerSample, x: Tensor, scale: Tensor, of: nn.Parameter) -> Tensor:
    """Return x [k * b, ..., d] times scale [k, d], as DoRA's magnitude scales."""
    _check_rows(x.shape[0] // scale.shape[0], kept.rows)
    found: Tensor = _Scaled.apply(x, scale, kept, of)  # type: ignore[no-untyped-call]
    return found


def _check_rows(found: int, rows: int) -> None:
    if found % rows:
        raise ModelError(
            "differential privacy: a layer of this model mixes the rows of a batch (they are no longer its "
            "slowest axis), so no row's own gradient can be had; leave the layer out of "
            "adapter.target_modules, or choose another base model.",
            kind="not-by-rows",
        )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kept: PerSample,
        of: tuple[nn.Parameter, ...],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kept, ctx.of = kept, of
        y = torch.bmm(x, weight.transpose(1, 2).to(x.dtype))
        return y if bias is None else y + bias[:, None].to(y.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        sites, rows = x.shape[0], ctx.kept.rows
        each = gradient.reshape(sites * rows, -1, gradient.shape[-1])
        if ctx.needs_input_grad[1]:
            inputs = x.reshape(sites * rows, -1, x.shape[-1]).to(each.dtype)
            found = torch.bmm(each.transpose(1, 2), inputs)
            ctx.kept.add(ctx.of[0], found.view(sites, rows, *found.shape[1:]))
        if ctx.needs_input_grad[2]:
            ctx.kept.add(ctx.of[1], each.sum(dim=1).view(sites, rows, -1))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        return torch.bmm(gradient, weight.to(gradient.dtype)).to(x.dtype), None, None, None, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kept: PerSample,
        of: tuple[nn.Parameter, ...],
        geometry: Mapping[str, Any],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kept, ctx.of, ctx.geometry = kept, of, geometry
        return grouped(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        sites, rows = weight.shape[0], ctx.kept.rows
        kind = gradient.dtype  # of the forward pass, which autocast may have lowered
        with torch.enable_grad():
            # A weight per row: each becomes a group of its own, so that its gradient is that row's alone.
            repeated = weight.detach().repeat_interleave(rows, dim=0).to(kind)
            repeated.requires_grad_(ctx.needs_input_grad[1])
            inputs = x.detach().to(kind, copy=True).requires_grad_(ctx.needs_input_grad[0])
            y = grouped(inputs, repeated, None, ctx.geometry)
        wanted = [each for each in (inputs, repeated) if each.requires_grad]
        found = dict(zip(map(id, wanted), torch.autograd.grad(y, wanted, gradient), strict=True))
        if (weights := found.get(id(repeated))) is not None:
            ctx.kept.add(ctx.of[0], weights.view(sites, rows, *weights.shape[1:]))
        if ctx.needs_input_grad[2]:
            sums = gradient.reshape(sites, rows, -1, *gradient.shape[1:]).sum(dim=(2, 4, 5))
            ctx.kept.add(ctx.of[1], sums)
        of_input = found.get(id(inputs))
        return None if of_input is None else of_input.to(x.dtype), None, None, None, None, None


def grouped(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Mapping[str, Any]) -> Tensor:
    """Convolve [k * b, c_in, h, w] with a weight for each of k parts: the parts become groups."""
    parts = weight.shape[0]
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype).flatten()
    side = x.reshape(parts, -1, *x.shape[1:]).transpose(0, 1).flatten(1, 2)
    settings = {**geometry, "groups": parts * geometry["groups"]}
    y = nn.functional.conv2d(side, weight.flatten(0, 1), bias, **settings)
    apart = y.reshape(y.shape[0], parts, -1, *y.shape[2:])
    return apart.transpose(0, 1).flatten(0, 1)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, kept: PerSample, of: nn.Parameter) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.kept, ctx.of = kept, of
        return x * spread(scale, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, scale = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            sites, rows = scale.shape[0], ctx.kept.rows
            each = (gradient * x).reshape(sites, rows, -1, scale.shape[-1])
            ctx.kept.add(ctx.of, each.sum(dim=2))
        return gradient * spread(scale, x) if ctx.needs_input_grad[0] else None, None, None, None


def spread(scale: Tensor, x: Tensor) -> Tensor:
    """Return scale [k, d] as [k * b, 1, ..., d], to multiply x [k * b, ..., d] with."""
    each = scale.to(x.dtype).repeat_interleave(x.shape[0] // scale.shape[0], dim=0)
    return each.reshape(x.shape[0], *[1] * (x.ndim - 2), -1)
