"""Loading a base model: whatever its files leave open must be in the adapter that a run exports."""

from pathlib import Path
from typing import Any

import pytest
import small_images
import tiny_lm
import torch
from refusals import refuses
from safetensors.torch import load_file, save_file

from quorate.shared.errors import ModelError
from quorate.shared.model.lora_model import adapter_schema, load_model


@pytest.mark.parametrize(
    "adapter",
    [{}, {"modules_to_save": ["encoder.layer.0.output.dense"]}, {"target_modules": "all-linear"}],
    ids=["frozen", "other module saved", "under LoRA"],
)
def test_a_drawn_pooler_that_would_be_lost_is_refused(
    make_run: Any, poolerless_bert: Path, adapter: dict[str, Any]
) -> None:
    run = make_run(model={"model_name_or_path": str(poolerless_bert)}, adapter=adapter)
    with refuses(ModelError, "drawn-at-random") as caught:
        load_model(run)
    assert " bert.pooler.dense," in str(caught.value)
    with refuses(ModelError, "drawn-at-random") as without:
        adapter_schema(run)
    assert str(without.value) == str(caught.value)
    names = ", ".join([*adapter.get("modules_to_save", ()), "bert.pooler.dense"])
    assert str(caught.value).endswith(f"adapter.modules_to_save: [{names}].")


def test_a_drawn_pooler_can_be_part_of_the_adapter(make_run: Any, poolerless_bert: Path) -> None:
    adapter = {"modules_to_save": ["bert.pooler.dense"]}
    run = make_run(model={"model_name_or_path": str(poolerless_bert)}, adapter=adapter)
    names = set(load_model(run).initial)
    assert {f"base_model.model.bert.pooler.dense.{kind}" for kind in ("weight", "bias")} <= names
    assert "base_model.model.classifier.weight" in names, "the head is trained without being named"


def test_a_drawn_norm_cannot_be_trained_so_another_base_is_needed(
    make_run: Any, tiny_bert: Path, tmp_path: Path
) -> None:
    for path in tiny_bert.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    lacking = {name for name in weights if name.startswith("embeddings.LayerNorm.")}
    assert lacking
    kept = {name: tensor for name, tensor in weights.items() if name not in lacking}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with refuses(ModelError, "drawn-at-random") as caught:
        load_model(make_run(model={"model_name_or_path": str(tmp_path)}))
    assert "embeddings.LayerNorm" in str(caught.value)
    assert "adapter.modules_to_save" not in str(caught.value), "a norm cannot be trained"


def test_a_head_of_another_size_gives_way_to_the_runs(make_run: Any, tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertForSequenceClassification

    BertForSequenceClassification.from_pretrained(tiny_bert, num_labels=7).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    run = make_run(model={"model_name_or_path": str(tmp_path)})
    model = load_model(run)
    assert adapter_schema(run) == model.initial.schema
    assert model.initial["base_model.model.classifier.weight"].shape == (3, 32)
    with torch.inference_mode():
        assert model.peft(input_ids=torch.tensor([[2, 5, 3]])).logits.shape == (1, 3)


@pytest.mark.parametrize(
    "adapter",
    [
        {},
        {"r": 4, "use_dora": True},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": r".*layer\.1.*(query|value)", "modules_to_save": ["encoder.layer.0.output.dense"]},
        {"head": {"hidden_sizes": [5, 3]}},
    ],
    ids=["default", "dora", "all-linear", "saved whole", "head"],
)
def test_the_adapters_shapes_need_no_weights(
    make_run: Any, tiny_bert: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    run = make_run(model={"model_name_or_path": str(tiny_bert)}, adapter=adapter)
    drawn = torch.random.get_rng_state()
    assert adapter_schema(run) == load_model(run).initial.schema
    assert torch.equal(torch.random.get_rng_state(), drawn)

    for path in tiny_bert.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = {name: tensor * torch.nan for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    spoiled = make_run(model={"model_name_or_path": str(tmp_path)}, adapter=adapter)
    with refuses(ModelError, "weights-not-finite", where=str(tmp_path)):
        load_model(spoiled)
    assert adapter_schema(spoiled) == adapter_schema(run)


@pytest.mark.parametrize("architecture", small_images.ARCHITECTURES)
def test_shapes_of_convolutions_need_no_weights(tmp_path: Path, architecture: str) -> None:
    run = small_images.make_run(small_images.save_model(tmp_path, architecture))
    assert adapter_schema(run) == load_model(run).initial.schema


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_shapes_of_language_models_need_no_weights(tmp_path: Path, kind: str) -> None:
    run = tiny_lm.lm_run(tiny_lm.save(tmp_path, kind))
    assert adapter_schema(run) == load_model(run).initial.schema
