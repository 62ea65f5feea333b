"""The exported adapter is the federation's model: PEFT's logits against W0 + s (B A + residual)."""

import copy
import re
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from refusals import refuses
from transformers import BertConfig, BertForSequenceClassification

from quorate.shared.adapters.adapter import LORA_A, LORA_B, Adapter, lora_layers
from quorate.shared.adapters.peft_export import as_lora
from quorate.shared.aggregation import FedEx, GlobalState
from quorate.shared.aggregation.rule import RESIDUAL_A, RESIDUAL_B
from quorate.shared.errors import AdapterError

R, ALPHA = 2, 6.0
PREFIX = "base_model.model."

# peft 0.21.2 asks transformers 5 for an attribute under its old name; only peft can change that.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def lora(use_rslora: bool, **patterns: object) -> LoraConfig:
    return LoraConfig(
        task_type="SEQ_CLS",
        r=R,
        lora_alpha=ALPHA,
        use_rslora=use_rslora,
        target_modules=["query", "output.dense"],  # the second ends the names of two layers of each block
        **patterns,
    )


def federated(base: BertForSequenceClassification) -> GlobalState:
    """Two rounds of fedex over three random sites; one layer stays equal everywhere, so has no residual."""
    model = get_peft_model(copy.deepcopy(base), lora(use_rslora=False))
    start = Adapter(
        {name: tensor.numpy().copy() for name, tensor in get_peft_model_state_dict(model).items()}
    )
    rng = np.random.default_rng(0)
    equal = lora_layers(start)[0]
    state, rule = GlobalState(start), FedEx()
    for round in (1, 2):
        accumulator = rule.init(state, round)
        for weight in (10.0, 30.0, 5.0):
            moved = state.adapter.map(lambda _, a: a + 0.5 * rng.normal(size=a.shape).astype(np.float32))
            same = {equal + ending: start[equal + ending] for ending in (LORA_A, LORA_B)}
            accumulator.add("site", moved.updated(same), weight)
        state = accumulator.finish()[0]
    assert len(state.residual) == 2 * (len(lora_layers(start)) - 1)
    return state


def written_out(
    base: BertForSequenceClassification, state: GlobalState, scaling: float
) -> BertForSequenceClassification:
    """The base in float64 with every adapted weight written out and the head put in."""
    model = copy.deepcopy(base).double()
    parameters = dict(model.named_parameters())
    arrays = {name: torch.from_numpy(array).double() for name, array in state.stored().items()}
    with torch.no_grad():
        for layer in lora_layers(state.adapter):
            update = arrays[layer + LORA_B] @ arrays[layer + LORA_A]
            if layer + RESIDUAL_B in arrays:
                update += arrays[layer + RESIDUAL_B] @ arrays[layer + RESIDUAL_A]
            parameters[layer.removeprefix(PREFIX) + ".weight"].add_(scaling * update)
        for name, array in arrays.items():
            if "classifier" in name:
                parameters[name.removeprefix(PREFIX)].copy_(array)
    return model


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_loads_the_export_and_gives_the_federations_logits(
    base: BertForSequenceClassification, tmp_path: Path, use_rslora: bool
) -> None:
    state = federated(base)
    adapter, ranks, alphas = as_lora(state, R, ALPHA, use_rslora)
    lora(use_rslora, rank_pattern=ranks, alpha_pattern=alphas).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(adapter.to_bytes())
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()

    tokens = torch.randint(1, 50, (5, 12), generator=torch.Generator().manual_seed(1))
    scaling = ALPHA / np.sqrt(R) if use_rslora else ALPHA / R
    with torch.no_grad():
        expected = written_out(base, state, scaling)(input_ids=tokens).logits
        without = written_out(base, GlobalState(state.adapter), scaling)(input_ids=tokens).logits
        logits = loaded(input_ids=tokens).logits
    assert (expected - without).abs().max() > 0.01, "the residual must matter, or this test shows nothing"
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5)
    scalings = [m.scaling["default"] for m in loaded.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(scalings) == 6
    np.testing.assert_allclose(scalings, scaling, rtol=1e-12)


def test_patterns_match_their_own_layer_and_no_other(base: BertForSequenceClassification) -> None:
    _, ranks, alphas = as_lora(federated(base), R, ALPHA, use_rslora=False)
    assert ranks.keys() == alphas.keys()
    assert len(ranks) == 5
    for key, rank in ranks.items():
        name = re.sub(r"\\(.)", r"\1", key.removeprefix("^"))
        assert get_pattern_key([key], name) == key
        assert alphas[key] / rank == pytest.approx(ALPHA / R)
        for other in (f"decoder.{name}", f"x{name}", f"{name}.inner", name.replace(".", "_", 1)):
            assert get_pattern_key([key], other) == other


def test_without_a_residual_the_export_is_the_adapter_itself(base: BertForSequenceClassification) -> None:
    adapter = federated(base).adapter
    exported, ranks, alphas = as_lora(GlobalState(adapter), R, ALPHA, use_rslora=True)
    assert exported.content_hash == adapter.content_hash
    assert ranks == alphas == {}


def test_a_residual_that_does_not_fit_is_refused(base: BertForSequenceClassification) -> None:
    state = federated(base)
    names = sorted(state.residual)
    half = GlobalState(state.adapter, state.residual.subset(names[1:]))
    with refuses(AdapterError, "residual-alone"):
        as_lora(half, R, ALPHA, use_rslora=False)
    stranger = GlobalState(state.adapter, Adapter({"x" + name: a for name, a in state.residual.items()}))
    with refuses(AdapterError, "residual-alone"):
        as_lora(stranger, R, ALPHA, use_rslora=False)
    with refuses(AdapterError, "residual-shapes") as caught:
        as_lora(state, R + 1, ALPHA, use_rslora=False)
    assert f"rank {R + 1}" in str(caught.value)
