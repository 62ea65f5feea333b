"""K adapters on one frozen base: PEFT's trainable layers with a leading axis of sites.

Every trainable linear layer of PEFT's model (lora_A, lora_B, the saved head) becomes one with weight
[K, d_out, d_in]. A batch is laid out site-major, [K * b, ...]; the frozen base sees an ordinary batch. Names
stay PEFT's, so a slice of the stack is the adapter of one site.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from quorate.client.trainer.dp.per_sample import PerSample, convolution, grouped, linear, scaled, spread
from quorate.client.trainer.dropout import draw_keys, keep_probability, kept
from quorate.shared.adapters.adapter import LORA_MAGNITUDE, Adapter
from quorate.shared.errors import AdapterError
from quorate.shared.model.heads import HeadDropout
from quorate.shared.model.lora_model import LoadedModel
from quorate.shared.tasks.task import Example


@dataclass(frozen=True)
class Layout:
    """Which sites the batch in flight belongs to.

    Args:
        sites: stack positions present in the batch, in its order.
        rows: real rows of each of them (the rest of its share is padding).
        sequences: that stand for one row, one after the other; two for a pair to compare.
        generators: each site's dropout generator; None turns LoRA dropout off.
        padded_in_front: whether short rows are padded in front, not behind.
        per_sample: where rows' own gradients are kept; None sums them up as usual.
    """

    sites: tuple[int, ...] = (0,)
    rows: tuple[int, ...] = ()
    sequences: int = 1
    generators: tuple[torch.Generator, ...] | None = None
    padded_in_front: bool = False
    per_sample: PerSample | None = None


@dataclass
class InFlight:
    """The layout of the batch in flight, shared by all stacked layers; see `AdapterStack.batch`."""

    layout: Layout = field(default_factory=Layout)


class Stacked(nn.Module):
    """A trainable tensor per site, [K, ...], of which a batch sees the slices of its own sites."""

    def __init__(self, in_flight: InFlight) -> None:
        super().__init__()
        self._in_flight = in_flight

    @property
    def layout(self) -> Layout:
        return self._in_flight.layout

    def of_batch(self, stack: Tensor) -> Tensor:
        """Return the slices of the batch's sites, [k, ...]; the stack itself when all take part."""
        sites = self.layout.sites
        if sites == tuple(range(stack.shape[0])):
            return stack
        return stack[list(sites)]

    def check_rows(self, x: Tensor) -> int:
        """Return how many sequences of each site the input has, padding included; 1 where it has none.

        Raises: AdapterError: it is not made of rows (a table of positions, for instance), and of several
            sites, whose parts of it nothing tells apart.
        """
        layout = self.layout
        sites, most = len(layout.sites), layout.sequences * max(layout.rows, default=1)
        if x.shape[0] % (sites * most) == 0:
            return most
        if sites > 1:
            raise AdapterError(
                f"a trained layer is given {x.shape[0]} entries for {sites * most} rows, so its input is not "
                "made of rows; train one site at a time (training.max_stack: 1), or leave the layer out "
                "of adapter.target_modules.",
                kind="not-rows",
            )
        return 1


class StackedLinear(Stacked):
    """`nn.Linear` for K sites: weight [K, d_out, d_in], bias [K, d_out]."""

    def __init__(self, linear: nn.Linear, in_flight: InFlight) -> None:
        super().__init__(in_flight)
        self.weight = nn.Parameter(linear.weight.detach()[None].clone())
        bias: Tensor | None = linear.bias  # typed as never None, which it is for bias=False
        self.bias = None if bias is None else nn.Parameter(bias.detach()[None].clone())
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Map [k * b, ..., d_in] to [k * b, ..., d_out], each site's rows by its own weight."""
        weight = self.of_batch(self.weight)
        if len(weight) > 1:
            self.check_rows(x)
        flat = x.reshape(weight.shape[0], -1, self.in_features)
        bias = None if self.bias is None else self.of_batch(self.bias)
        if (kept := self.layout.per_sample) is not None:
            y = linear(kept, flat, weight, bias, tuple(self.parameters()))
        else:
            y = torch.bmm(flat, weight.transpose(1, 2).to(flat.dtype))
            if bias is not None:
                y = y + bias[:, None].to(y.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)


class StackedConv2d(Stacked):
    """`nn.Conv2d` for K sites: weight [K, c_out, c_in / groups, h, w], bias [K, c_out].

    The sites become groups of one convolution: [k * b, c, h, w] is seen as [b, k * c, h, w].
    """

    def __init__(self, conv: nn.Conv2d, in_flight: InFlight) -> None:
        super().__init__(in_flight)
        if type(conv) is not nn.Conv2d:
            raise AdapterError(
                f"a {type(conv).__name__} cannot be trained for several sites at once: it may compute other "
                "things than a convolution; leave it out of adapter.target_modules.",
                kind="special-convolution",
            )
        if conv.padding_mode != "zeros":
            message = f"convolutions with padding_mode {conv.padding_mode!r} cannot be trained."
            raise AdapterError(message, kind="padding-mode")
        self.weight = nn.Parameter(conv.weight.detach()[None].clone())
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach()[None].clone())
        self.geometry = {
            "stride": conv.stride,
            "padding": conv.padding,
            "dilation": conv.dilation,
            "groups": conv.groups,
        }

    def forward(self, x: Tensor) -> Tensor:
        """Map [k * b, c_in, h, w] to [k * b, c_out, h', w'], each site's images by its own weight."""
        weight = self.of_batch(self.weight)
        bias = None if self.bias is None else self.of_batch(self.bias)
        if (kept := self.layout.per_sample) is not None:
            return convolution(kept, x, weight, bias, tuple(self.parameters()), self.geometry)
        return grouped(x, weight, bias, self.geometry)


class StackedDropout(Stacked):
    """LoRA dropout in which each row's mask follows from a key that its site's generator draws.

    A mask does not depend on how far the row is padded, in whichever of its axes; so a site that is padded to
    the rows of another one drops what it would have dropped alone. See `quorate.client.trainer.dropout`. A
    model that puts something behind the padding would break that.
    """

    def __init__(self, p: float, in_flight: InFlight) -> None:
        super().__init__(in_flight)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Drop and rescale when the layout carries generators; else return `x`, [k * b * ..., ...]."""
        layout = self.layout
        if layout.generators is None or self.p == 0:
            return x
        most = self.check_rows(x)
        device = layout.generators[0].device
        # What fills a site's share up counts for nothing, and needs no key of its own.
        keys = torch.zeros(len(layout.sites), most, dtype=torch.int64, device=device)
        for index, generator in enumerate(layout.generators):
            count = min(layout.sequences * layout.rows[index], most)
            keys[index, :count] = draw_keys(generator, count)
        parts = x.reshape(keys.numel(), -1, *x.shape[1:])
        mask = kept(keys.flatten().to(x.device), parts.shape[1:], self.p, from_end=layout.padded_in_front)
        return (parts * (mask.to(x.dtype) / keep_probability(self.p))).view_as(x)


class StackedDora(Stacked):
    """PEFT's DoRA layer for K sites: magnitude [K, d_out]; arXiv:2402.09353, equation 5.

    As in PEFT, the norm of W + s B A is a constant for the gradient.
    """

    def __init__(self, dora: DoraLinearLayer, in_flight: InFlight) -> None:
        super().__init__(in_flight)
        self.fan_in_fan_out = dora.fan_in_fan_out
        self.weight = nn.Parameter(dora.weight.detach()[None].clone())

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: StackedLinear,
        lora_B: StackedLinear,
        scaling: float,
        base_layer: nn.Module,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """Return what is added to the base layer's output, [k * b, ..., d_out]."""
        weight = dequantize_module_weight(base_layer).to(x.dtype)
        weight = weight.T if self.fan_in_fan_out else weight
        a, b = self.of_batch(lora_A.weight).detach(), self.of_batch(lora_B.weight).detach()
        norm = torch.linalg.norm(weight + scaling * torch.bmm(b, a), dim=2)
        bias = getattr(base_layer, "bias", None)
        if base_result is None:
            base_result = nn.functional.linear(x, weight)
        elif bias is not None:
            base_result = base_result - bias
        learnt: Tensor = lora_B(lora_A(x))
        if (kept := self.layout.per_sample) is not None:
            unit = (base_result + learnt * scaling) / spread(norm, x)
            return scaled(kept, unit, self.of_batch(self.weight), self.weight) - base_result
        scale = spread(self.of_batch(self.weight) / norm, x)
        added: Tensor = (scale - 1) * base_result + scale * learnt * scaling
        return added


@dataclass(frozen=True)
class RowsApart:
    """What was seen not to mix at a site.

    Args:
        rows: the examples that were tried.
        checkpointed: whether that was under gradient checkpointing.
        length: what all rows must be padded to for it [tokens]; None for the longest of a batch.
    """

    rows: tuple[Example, ...]
    checkpointed: bool
    length: int | None


@dataclass
class AdapterStack:
    """The stacked arrays of a model by adapter name, and the layout of the batch in flight."""

    model: LoadedModel
    in_flight: InFlight
    arrays: dict[str, nn.Parameter]
    lora_layers: list[LoraLayer] = field(default_factory=list)
    rows_apart: dict[str, RowsApart] = field(default_factory=dict)
    """Of which sites the rows of a batch were seen not to mix, see `quorate.client.trainer.dp`."""
    schemas: list[dict[str, tuple[int, ...]]] = field(default_factory=list)
    """Shapes of the adapter at each position, which may be smaller than the stack's."""

    @classmethod
    def install(cls, model: LoadedModel) -> AdapterStack:
        """Replace the trainable layers of `model.peft` by stacked ones of size 1. Done once per model."""
        in_flight = InFlight()
        modules = dict(model.peft.named_modules())
        arrays: dict[str, nn.Parameter] = {}
        for name, module in modules.items():
            if not any(p.requires_grad for p in module.parameters(recurse=False)):
                continue
            parent, _, child = name.rpartition(".")
            stacked = _stacked(name, module, in_flight)
            setattr(modules[parent], child, stacked)
            for kind, parameter in stacked.named_parameters(recurse=False):
                arrays[_saved_name(name, kind)] = parameter
        for name, module in modules.items():  # PEFT keeps the head it found beside the copy that is trained
            if isinstance(module, HeadDropout) and ".modules_to_save." in name:
                parent, _, child = name.rpartition(".")
                setattr(modules[parent], child, StackedDropout(module.p, in_flight))
        layers = [module for module in modules.values() if isinstance(module, LoraLayer)]
        for layer in layers:
            for key, dropout in layer.lora_dropout.items():
                if isinstance(dropout, nn.Dropout):
                    layer.lora_dropout[key] = StackedDropout(dropout.p, in_flight)
        if arrays.keys() != model.initial.keys():
            odd = sorted(arrays.keys() ^ model.initial.keys())
            raise AdapterError(f"stacked layers and PEFT disagree on the arrays {', '.join(odd[:3])}.")
        return cls(model, in_flight, arrays, layers)

    @property
    def size(self) -> int:
        return next(iter(self.arrays.values())).shape[0]

    @property
    def layout(self) -> Layout:
        """The layout of the batch in flight; outside of one that of a single site, without dropout."""
        return self.in_flight.layout

    @contextmanager
    def batch(self, layout: Layout) -> Iterator[None]:
        """Let the layers see a batch of this layout: one forward pass and, if any, its backward pass.

        Nothing else writes the layout. A checkpointed backward pass runs the layers again, so it belongs
        inside.
        """
        before, self.in_flight.layout = self.in_flight.layout, layout
        try:
            yield
        finally:
            self.in_flight.layout = before

    def load(self, adapters: Sequence[Adapter], trainable: Iterable[str]) -> None:
        """Hold these adapters, one per stack position; arrays outside `trainable` get no gradient.

        One with smaller arrays, as of a lower rank, has zeros around them, which nothing moves.

        Raises: AdapterError: an adapter has other arrays than the model, or larger ones.
        """
        moving, shapes = set(trainable), {name: tuple(p.shape[1:]) for name, p in self.arrays.items()}
        whole = [adapter.padded(shapes) for adapter in adapters]
        self.schemas = [adapter.schema for adapter in adapters]
        for name, parameter in self.arrays.items():
            values = torch.from_numpy(np.stack([adapter[name] for adapter in whole]))
            parameter.data = values.to(parameter.device)
            parameter.grad = None
            parameter.requires_grad_(name in moving)

    def own(self, position: int, name: str, array: Tensor) -> Tensor:
        """Return a view of the part of an array [..., *shape in the stack] that is the adapter's there."""
        for axis, size in enumerate(reversed(self.schemas[position][name]), 1):
            array = array.narrow(-axis, 0, size)
        return array

    def read(self, position: int) -> Adapter:
        return Adapter(
            {
                n: self.own(position, n, p.detach()[position]).cpu().numpy().copy()
                for n, p in self.arrays.items()
            }
        )

    def site_parameters(self, position: int) -> dict[str, nn.Parameter]:
        """Return one site's trainable arrays as parameters that share the stack's memory.

        An optimiser over them sees exactly what it would see if the site were alone.
        """
        return {
            n: nn.Parameter(self.own(position, n, p.data[position]))
            for n, p in self.arrays.items()
            if p.requires_grad
        }

    def set_lora_training(self, training: bool) -> None:
        """Tell PEFT's LoRA layers whether dropout is live; DoRA recomputes its base term then."""
        for layer in self.lora_layers:
            layer.training = training  # type: ignore[attr-defined]


def _stacked(name: str, module: nn.Module, in_flight: InFlight) -> Stacked:
    if isinstance(module, DoraLinearLayer):
        return StackedDora(module, in_flight)
    if isinstance(module, nn.Linear):
        return StackedLinear(module, in_flight)
    if isinstance(module, nn.Conv2d):
        return StackedConv2d(module, in_flight)
    raise AdapterError(f"{name}: a {type(module).__name__} cannot be trained for several sites at once.")


def _saved_name(module: str, kind: str) -> str:
    """Return the name under which PEFT saves a trainable parameter of `module`."""
    name = f"{module}.{kind}".replace(".modules_to_save.default.", ".").replace(".default.", ".")
    return name.removesuffix(".weight") if LORA_MAGNITUDE in name else name
