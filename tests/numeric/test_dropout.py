"""LoRA dropout: what is dropped of a row depends on its key and the place alone, not on the padding."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from refusals import refuses
from scipy import stats
from torch import Tensor, nn

from quorate.client.trainer.dp.per_sample import PerSample
from quorate.client.trainer.dropout import draw_keys, keep_probability, kept
from quorate.client.trainer.stack import AdapterStack, InFlight, Layout, StackedDropout, StackedLinear
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.errors import AdapterError
from quorate.shared.model.lora_model import LoadedModel

P = 0.5
WIDTH, IMAGE_TOKENS = 6, 5


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), min_size=1, max_size=4), st.integers(0, 9))
def test_a_larger_row_has_the_same_mask_where_both_have_entries(
    sizes: list[tuple[int, int]], seed: int
) -> None:
    keys = draw_keys(generator(seed), 3)
    small, large = [size for size, _ in sizes], [size + more for size, more in sizes]
    inside = (slice(None), *(slice(size) for size in small))
    assert torch.equal(kept(keys, small, P), kept(keys, large, P)[inside])
    *outer, last = zip(small, large, strict=True)  # padding in front is at every end but the last
    behind = (slice(None), *(slice(b - a, None) for a, b in outer), slice(last[0]))
    one, other = (kept(keys, shape, P, from_end=True) for shape in (small, large))
    assert torch.equal(one, other[behind])


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_entries_are_dropped_independently_with_their_probability(p: float) -> None:
    mask = kept(draw_keys(generator(1), 64), (50, 70), p).double().numpy()
    rate = keep_probability(p)
    assert rate == pytest.approx(1 - p, abs=1e-5)
    assert stats.binomtest(int(mask.sum()), mask.size, rate).pvalue > 1e-4
    centred = (mask - rate) / np.sqrt(rate * (1 - rate))
    for axis in range(3):
        for lag in (1, 2, 3, 4, 8):
            one = np.take(centred, range(mask.shape[axis] - lag), axis)
            other = np.take(centred, range(lag, mask.shape[axis]), axis)
            assert abs((one * other).mean()) * np.sqrt(one.size) < 4.5, (axis, lag)
    for axes in ((0,), (1,), (2,), (1, 2)):
        counts = mask.sum(axis=axes).ravel()
        n = mask.size / counts.size
        spread = counts.var() / (n * rate * (1 - rate))
        assert spread == pytest.approx(1, abs=6 * np.sqrt(2 / counts.size)), axes


class TwoLengths(nn.Module):
    """Texts of any length beside images of five tokens, as flat rows of tokens in its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.flat = nn.Linear(WIDTH, 1)

    def forward(self, text: Tensor, image: Tensor, real: Tensor) -> Tensor:
        """Return a loss per row, [rows]; places of `text` that are not `real` count for nothing."""
        written, seen = self.text(text).tanh(), self.image(image).tanh()
        both = torch.cat([seen, written * real[..., None]], dim=1)
        each = self.flat(both.reshape(-1, WIDTH)).view(len(text), -1)
        mask = torch.cat([real.new_ones(len(text), IMAGE_TOKENS), real], dim=1)
        loss: Tensor = (each.square() * mask).sum(dim=1)
        return loss


def two_lengths() -> tuple[LoadedModel, AdapterStack]:
    torch.manual_seed(0)
    config = LoraConfig(
        r=2, lora_dropout=P, target_modules=["text", "image", "flat"], init_lora_weights=False
    )
    peft = get_peft_model(TwoLengths(), config)
    arrays = {name: value.numpy().copy() for name, value in get_peft_model_state_dict(peft).items()}
    model = LoadedModel(peft, None, {}, "", Adapter(arrays))
    return model, AdapterStack.install(model)


def gradients(lengths: list[int], sites: list[int], counts: list[int]) -> dict[int, dict[str, Tensor]]:
    """Each site's gradients in one pass over `sites`: rows of its length, padded to the longest of them."""
    model, stack = two_lengths()
    stack.load([model.initial] * len(sites), tuple(model.initial))
    most, longest = max(counts[i] for i in sites), max(lengths[i] for i in sites)
    texts = torch.zeros(len(sites), most, longest, WIDTH)
    images, real = torch.zeros(len(sites), most, IMAGE_TOKENS, WIDTH), torch.zeros(len(sites), most, longest)
    present = torch.zeros(len(sites), most)
    for place, site in enumerate(sites):
        draw, count, length = generator(100 + site), counts[site], lengths[site]
        texts[place, :count, :length] = torch.randn(count, length, WIDTH, generator=draw)
        images[place, :count] = torch.randn(count, IMAGE_TOKENS, WIDTH, generator=draw)
        real[place, :count, :length] = 1
        present[place, :count] = 1
    layout = Layout(
        sites=tuple(range(len(sites))),
        rows=tuple(counts[i] for i in sites),
        generators=tuple(generator(site) for site in sites),
    )
    with stack.batch(layout):
        losses = model.peft(texts.flatten(0, 1), images.flatten(0, 1), real.flatten(0, 1))
        (losses.view(len(sites), most) * present).sum().backward()
    return {
        site: {name: p.grad[place] for name, p in stack.arrays.items() if p.grad is not None}
        for place, site in enumerate(sites)
    }


@pytest.mark.parametrize(
    "lengths",
    [[3, 9, 4], [IMAGE_TOKENS, 3, 2], [2, 3, WIDTH], [3, 3, 3]],
    ids=["another-length", "as-long-as-images", "as-long-as-wide", "equal"],
)
def test_a_model_of_two_lengths_is_the_same_stacked_or_alone(lengths: list[int]) -> None:
    counts = [2, 3, 1]
    together = gradients(lengths, [0, 1, 2], counts)
    for site in range(3):
        (alone,) = gradients(lengths, [site], counts).values()
        assert alone.keys() == together[site].keys() != set()
        for name in alone:
            torch.testing.assert_close(together[site][name], alone[name], rtol=1e-4, atol=1e-5)
    for one, other in pairwise(together.values()):
        assert any(not torch.equal(one[name], other[name]) for name in one)


def test_every_entry_of_a_row_may_be_dropped_whatever_its_first_axis_holds() -> None:
    """Windows of an image, or tokens, may stand beside rows in the first axis."""
    rows, windows = 3, 40
    layout = InFlight(Layout(rows=(rows,), generators=(generator(0),)))
    found = StackedDropout(P, layout)(torch.ones(rows * windows, WIDTH)).view(rows, -1)
    dropped = (found == 0).double().mean(dim=1)
    assert ((dropped > 0.3) & (dropped < 0.7)).all()


def test_a_layer_whose_input_is_not_made_of_rows_is_one_sites_alone() -> None:
    """A table of positions stands for all rows at once."""
    positions = torch.ones(1, 12, WIDTH)
    in_flight = InFlight(Layout(rows=(4,), generators=(generator(0),)))
    assert (StackedDropout(P, in_flight)(positions) == 0).any()
    linear = StackedLinear(nn.Linear(WIDTH, 2), in_flight)
    assert linear(positions).shape == (1, 12, 2)
    linear.weight.data = torch.ones(2, 2, WIDTH)
    linear.bias = None
    in_flight.layout = Layout((0, 1), (4, 3), generators=(generator(0), generator(1)))
    for layer in (linear, StackedDropout(P, in_flight)):
        with refuses(AdapterError, "not-rows") as caught:
            layer(positions)
        assert "training.max_stack: 1" in str(caught.value)


def test_a_row_of_two_sequences_drops_together_what_it_drops_alone() -> None:
    """A pair to compare is one row: site-major, and the two sequences of a row one after the other."""
    counts, sequences = (3, 2), 2
    most = max(counts)
    x = torch.ones(len(counts) * most * sequences, 7, WIDTH)
    both = Layout((0, 1), counts, sequences, generators=(generator(0), generator(1)))
    together = StackedDropout(P, InFlight(both))(x).view(len(counts), most * sequences, 7, WIDTH)
    for site, count in enumerate(counts):
        one = Layout((0,), (count,), sequences, generators=(generator(site),))
        alone = StackedDropout(P, InFlight(one))(x[: count * sequences])
        assert torch.equal(together[site, : count * sequences], alone)
        masks = {tuple((each == 0).flatten().tolist()) for each in alone}
        assert len(masks) == count * sequences, "each sequence has a mask of its own"


def test_pairs_are_rows_of_the_privacy_of_a_stack() -> None:
    """The two sequences of a row have one gradient, which is what is clipped."""
    rows, sequences = 3, 2
    torch.manual_seed(0)
    kept = PerSample(rows)
    in_flight = InFlight(Layout((0,), (rows,), sequences, per_sample=kept))
    layer = StackedLinear(nn.Linear(WIDTH, 2, bias=False), in_flight)
    x = torch.randn(rows * sequences, 5, WIDTH)
    layer(x).square().sum().backward()
    found = kept.of_site({"weight": layer.weight}, 0, rows)["weight"]
    in_flight.layout = Layout((0,))
    for row in range(rows):
        pair = x[row * sequences : (row + 1) * sequences]
        (expected,) = torch.autograd.grad(layer(pair).square().sum(), [layer.weight])
        torch.testing.assert_close(found[row], expected[0])
