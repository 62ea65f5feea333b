"""K convolutions in one pass are K convolutions: outputs and gradients, whatever their geometry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from refusals import refuses
from torch import Tensor, nn

from quorate.client.trainer.stack import InFlight, Layout, StackedConv2d, StackedDropout
from quorate.shared.errors import AdapterError

GEOMETRIES: dict[str, dict[str, Any]] = {
    "pointwise": {"kernel_size": 1, "bias": False},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "oblong": {"kernel_size": (3, 5), "stride": (1, 2), "padding": (0, 2)},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "same": {"kernel_size": 4, "padding": "same"},
    "groups": {"kernel_size": 3, "groups": 2, "bias": False},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1},
}
SITES, ROWS = 3, 2

# PyTorch says so of every even kernel with padding "same".
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


def stack_of(layers: list[nn.Conv2d], in_flight: InFlight) -> StackedConv2d:
    stacked = StackedConv2d(layers[0], in_flight)
    stacked.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
    if layers[0].bias is not None:
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        stacked.bias = nn.Parameter(torch.stack(biases))
    return stacked


@pytest.mark.parametrize("sites", [(0,), (0, 1, 2), (2, 0), (1,)], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_each_site_sees_its_own_convolution(geometry: str, sites: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 8, **GEOMETRIES[geometry]).double() for _ in range(SITES)]
    stacked = stack_of(layers, InFlight(Layout(sites)))
    x = torch.randn(len(sites) * ROWS, 4, 9, 11, dtype=torch.float64, requires_grad=True)
    y = stacked(x)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    parts = x.detach().split(ROWS)
    for position, (site, part) in enumerate(zip(sites, parts, strict=True)):
        alone = part.clone().requires_grad_()
        expected = layers[site](alone)
        rows = slice(position * ROWS, (position + 1) * ROWS)
        assert_same(y[rows], expected)
        (expected * weight[rows]).sum().backward()
        assert_same(x.grad[rows], alone.grad)  # type: ignore[index]
        assert_same(stacked.weight.grad[site], layers[site].weight.grad)  # type: ignore[index]
        if stacked.bias is not None:
            assert_same(stacked.bias.grad[site], layers[site].bias.grad)  # type: ignore[index,union-attr]
    absent = [site for site in range(SITES) if site not in sites]
    assert not stacked.weight.grad[absent].any()  # type: ignore[index]


def assert_same(one: Tensor, other: Tensor | None) -> None:
    assert other is not None
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_what_a_stack_cannot_do_as_the_layer_does_is_refused() -> None:
    class Scaled(nn.Conv2d):
        pass

    with refuses(AdapterError, "special-convolution") as caught:
        StackedConv2d(Scaled(2, 2, 1), InFlight())
    assert "Scaled" in str(caught.value)
    with refuses(AdapterError, "padding-mode") as caught:
        StackedConv2d(nn.Conv2d(2, 2, 3, padding_mode="circular"), InFlight())
    assert "'circular'" in str(caught.value)


def test_dropout_of_images_is_the_same_stacked_or_alone() -> None:
    x = torch.ones(3 * ROWS, 4, 5, 6)

    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    rows = (2, 1, 2)
    layout = Layout((0, 1, 2), rows, generators=tuple(map(generator, range(3))))
    together = StackedDropout(0.5, InFlight(layout))(x).split(ROWS)
    for seed, (count, found) in enumerate(zip(rows, together, strict=True)):
        one = Layout((0,), (count,), generators=(generator(seed),))
        alone = StackedDropout(0.5, InFlight(one))(x[:count])
        assert torch.equal(found[:count], alone)
        assert set(alone.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(together[0], together[2])
