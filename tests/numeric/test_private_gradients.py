"""A row's own gradient is what a loop over batches of one row gives, for every task and kind of layer."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_images
import tiny_lm
import torch
from loaded_models import load_model
from refusals import refuses
from row_gradients import kept, largest_error, noisy, one_by_one
from torch import nn
from torch.utils.checkpoint import checkpoint

from quorate.client.data.mapping import RowMapper
from quorate.client.trainer.dp.per_sample import PerSample
from quorate.client.trainer.dp.row_isolation import check_batch_statistics, check_rows_apart
from quorate.client.trainer.passes import training_mode
from quorate.client.trainer.stack import AdapterStack, InFlight, Layout, StackedConv2d, StackedLinear
from quorate.shared.config.run_config import RunConfig
from quorate.shared.config.sites_config import SourceConfig
from quorate.shared.errors import ModelError
from quorate.shared.tasks import SequenceClassification
from quorate.shared.tasks.task import Row

TOLERANCE = 1e-5
ORGANS = {"name": "token_classification", "labels": ["O", "B-organ", "I-organ"], "max_length": 24}
WORDS = ("fever", "cough", "pain", "dose", "scan", "heart", "liver", "lung", "blood")
MakeCase = Callable[[str], tuple[RunConfig, list[Row]]]


def texts(count: int, label: Callable[[random.Random], Any]) -> list[Row]:
    draw = random.Random(7)
    return [
        Row(
            {"text": " ".join(draw.choices(WORDS, k=draw.randint(1, 14))), "label": label(draw)},
            f"rows.csv:{index + 2}",
        )
        for index in range(count)
    ]


def tagged(count: int) -> list[Row]:
    draw = random.Random(7)
    rows = []
    for index in range(count):
        words = draw.choices(WORDS, k=draw.randint(1, 12))
        tags = [int(word in ("heart", "liver", "lung")) for word in words]
        rows.append(Row({"tokens": words, "ner_tags": tags}, f"rows.jsonl:{index + 1}"))
    return rows


def tabular(count: int) -> list[Row]:
    """Rows of a table that a site's template turns into texts; some cells are missing."""
    draw = random.Random(7)
    source = SourceConfig(source="x.csv", template="age {age:.0f}[[, pain {pain}]] fever {fever}")
    raw = [
        Row(
            {
                "age": draw.uniform(20, 90),
                "pain": draw.choice(["heart", "lung", None]),
                "fever": draw.randint(0, 9),
                "label": draw.randrange(3),
            },
            f"rows.csv:{index + 2}",
        )
        for index in range(count)
    ]
    mapper = RowMapper(source, {"text": "text", "label": "label"}, ("a", "b", "c"))
    return list(mapper.map(raw))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            if kind == "yolos":
                import small_detector

                made[kind] = small_detector.save_model(folder)
            elif kind in small_images.ARCHITECTURES:
                made[kind] = small_images.save_model(folder, kind)
            else:
                made[kind] = tiny_lm.save(folder, kind)
        return made[kind]

    return of


@pytest.fixture
def case(make_run: Any, folders: Any, tmp_path: Path) -> MakeCase:
    """A run and six rows of it by name; every linear layer of text models is adapted."""
    every = {"target_modules": "all-linear"}
    several = {"problem_type": "multi_label_classification"}

    def build(name: str) -> tuple[RunConfig, list[Row]]:
        kind, _, model = name.partition(":")
        if kind == "sequence_classification":
            return make_run(adapter=every), texts(6, lambda draw: draw.randrange(3))
        if kind == "multi_label":
            rows = texts(6, lambda draw: draw.sample(range(3), draw.randint(0, 2)))
            return make_run(task=several), rows
        if kind == "head":
            head = {"hidden_sizes": [12, 6], "activation": "tanh"}
            return make_run(adapter={"head": head}), texts(6, lambda draw: draw.randrange(3))
        if kind == "dora":
            return make_run(adapter={"use_dora": True, **every}), texts(6, lambda draw: draw.randrange(3))
        if kind == "sequence_regression":
            run = make_run()
            task = {"name": kind, "max_length": 24, "loss_function": "huber"}
            return _with_task(run, task), texts(6, lambda draw: draw.gauss(0, 1))
        if kind == "token_classification":
            return make_run(task=ORGANS, adapter=every), tagged(6)
        if kind == "tabular":
            return make_run(), tabular(6)
        if kind == "causal_lm":
            return tiny_lm.lm_run(folders(model), adapter={"target_modules": "all-linear"}), tiny_lm.lm_rows(
                6, 0
            )
        if kind == "object_detection":
            pytest.importorskip("scipy", reason="needs the extra `detection`")
            pytest.importorskip("pycocotools", reason="needs the extra `detection`")
            import small_detector

            task = {"name": kind, "labels": ["disc", "square", "bar"], "image_size": [32, 48]}
            run = small_images.make_run(folders("yolos"))
            return _with_task(run, task), small_detector.make_rows(tmp_path, 6, 0)
        run = small_images.make_run(folders(model), task={"image_size": 32} if model == "x" else {})
        rows = small_images.make_rows(tmp_path, 6, 0)
        if kind == "image_regression":
            rows = [Row({**row.values, "label": float(index)}, row.source) for index, row in enumerate(rows)]
            run = _with_task(run, {"name": kind})
        return run, rows

    return build


def _with_task(run: RunConfig, task: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate({**run.model_dump(), "task": task})


CASES = (
    "sequence_classification",
    "multi_label",
    "head",
    "dora",
    "sequence_regression",
    "token_classification",
    "tabular",
    "causal_lm:llama",
    "causal_lm:gpt2",
    "causal_lm:qwen2",
    "causal_lm:opt",
    "object_detection",
    "image_classification:ResNet",
    "image_classification:ViT",
    "image_classification:ConvNext",
    "image_classification:MobileNetV2",
    "image_regression:ResNet",
)


@pytest.mark.parametrize("name", CASES)
def test_rows_of_a_batch_have_the_gradients_they_have_alone(case: MakeCase, name: str) -> None:
    run, rows = case(name)
    # Convolutions between ReLUs: far from their start, the last bit decides on which side of a kink some are.
    start = noisy(load_model(run).initial, 1, 0.01 if "MobileNet" in name else 0.1)
    expected = one_by_one(run, rows, start)
    (found,) = kept(run, [rows], [start])
    assert found.keys() == start.keys()
    assert all(expected[array].abs().max() > 0 for array in start if "lora_" in array)
    assert largest_error(found, expected) < TOLERANCE


@pytest.mark.parametrize(
    "name",
    ["sequence_classification", "dora", "causal_lm:llama", "image_classification:ResNet", "object_detection"],
)
def test_stacked_sites_of_unequal_sizes_have_the_gradients_they_have_alone(case: MakeCase, name: str) -> None:
    run, rows = case(name)
    initial = load_model(run).initial
    sites, starts = [rows[:3], rows[3:4], rows[4:]], [noisy(initial, seed) for seed in range(3)]
    for part, start, found in zip(sites, starts, kept(run, sites, starts), strict=True):
        (alone,) = kept(run, [part], [start])
        assert largest_error(found, alone) < TOLERANCE
        assert largest_error(found, one_by_one(run, part, start)) < TOLERANCE


@pytest.mark.parametrize("name", ["sequence_classification", "causal_lm:llama"])
def test_checkpointed_layers_keep_the_same_gradients(case: MakeCase, name: str) -> None:
    run, rows = case(name)
    saving = RunConfig.model_validate(
        {**run.model_dump(), "training": {**run.training.model_dump(), "gradient_checkpointing": True}}
    )
    start = noisy(load_model(run).initial, 1)
    sites, starts = [rows[:4], rows[4:]], [start, start]
    for part, found in zip(sites, kept(saving, sites, starts), strict=True):
        assert largest_error(found, one_by_one(run, part, start)) < TOLERANCE


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_frozen_arrays_have_no_gradient_and_change_no_other(case: MakeCase, factor: str) -> None:
    run, rows = case("sequence_classification")
    start = noisy(load_model(run).initial, 1)
    moving = [name for name in start if factor in name]
    (found,) = kept(run, [rows], [start], moving)
    expected = one_by_one(run, rows, start)
    assert largest_error(found, {name: expected[name] for name in moving}) < TOLERANCE


@pytest.mark.parametrize("name", ["sequence_classification", "dora", "image_classification:ResNet"])
def test_bf16_keeps_float32_gradients_near_those_of_full_precision(case: MakeCase, name: str) -> None:
    run, rows = case(name)
    coarse = RunConfig.model_validate(
        {**run.model_dump(), "training": {**run.training.model_dump(), "bf16": True}}
    )
    start = noisy(load_model(run).initial, 1)
    (found,) = kept(coarse, [rows], [start])
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert 0 < largest_error(found, one_by_one(run, rows, start)) < 0.1


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_opacus_has_the_same_gradients(case: MakeCase) -> None:
    opacus = pytest.importorskip("opacus")
    run, rows = case("sequence_classification")
    model = load_model(run)
    start = noisy(model.initial, 1)
    model.write_adapter(start)
    for module in model.peft.train().modules():  # its hooks look at nothing in eval mode
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    hooked = opacus.GradSampleModule(model.peft, loss_reduction="sum", strict=False)
    batch = run.task.collate(run.task.encode(rows, model.processor), model.processor)
    run.task.loss(hooked(**batch.inputs).logits, batch).sum().backward()
    theirs = {
        name.removeprefix("_module."): parameter.grad_sample
        for name, parameter in hooked.named_parameters()
        if parameter.requires_grad
    }
    renamed = {
        name.replace(".default", "").replace("modules_to_save.", ""): value for name, value in theirs.items()
    }
    (found,) = kept(run, [rows], [start])
    assert largest_error(found, renamed) < TOLERANCE


# Planted errors: the checks above must fail on each of them.


def test_a_layer_trained_by_mistake_is_caught(case: MakeCase) -> None:
    run, rows = case("sequence_classification")
    start = noisy(load_model(run).initial, 1)
    frozen = "attention.output.LayerNorm.weight"

    def plant(model: Any, stack: AdapterStack) -> None:
        dict(model.peft.named_modules())["base_model.model.bert.embeddings.LayerNorm"].weight.requires_grad_(
            True
        )

    with refuses(ModelError, "summed-over-rows") as caught:
        kept(run, [rows], [start], prepare=plant)
    assert "embeddings.LayerNorm.weight " in str(caught.value)
    (found,) = kept(run, [rows], [start])
    assert largest_error(found, one_by_one(run, rows, start, unfrozen=frozen)) == float("inf")


def test_a_loss_averaged_over_the_batch_is_caught(case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    run, rows = case("sequence_classification")
    start = noisy(load_model(run).initial, 1)
    right = SequenceClassification.loss
    monkeypatch.setattr(
        SequenceClassification,
        "loss",
        lambda self, logits, batch: right(self, logits, batch) / len(batch.targets),
    )
    (found,) = kept(run, [rows], [start])
    assert largest_error(found, one_by_one(run, rows, start)) > 0.5
    with refuses(ModelError, "rows-mixed"):
        prove(run, rows)


def test_a_loss_over_the_batchs_tokens_is_caught(case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model's own `.loss` for token classification does."""
    from quorate.shared.tasks import TokenClassification

    run, rows = case("token_classification")
    start = noisy(load_model(run).initial, 1)
    right = TokenClassification.loss

    def shared(self: Any, logits: Any, batch: Any) -> Any:
        own = (batch.targets["pieces"] != -100).sum(dim=1)
        return right(self, logits, batch) * own / own.sum()

    monkeypatch.setattr(TokenClassification, "loss", shared)
    (found,) = kept(run, [rows], [start])
    assert largest_error(found, one_by_one(run, rows, start)) > 0.1
    with refuses(ModelError, "rows-mixed"):
        prove(run, rows)


def test_a_row_counted_twice_is_caught(case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    run, rows = case("sequence_classification")
    start = noisy(load_model(run).initial, 1)
    right = PerSample.add

    def twice(self: PerSample, parameter: Any, gradients: Any) -> None:
        gradients = gradients.clone()
        gradients[:, 0] *= 2
        right(self, parameter, gradients)

    monkeypatch.setattr(PerSample, "add", twice)
    (found,) = kept(run, [rows], [start])
    assert largest_error(found, one_by_one(run, rows, start)) > 0.1
    with refuses(ModelError, "rows-mixed"):
        prove(run, rows)


def prove(run: RunConfig, rows: list[Row]) -> AdapterStack:
    model = load_model(run)
    stack = AdapterStack.install(model)
    check_rows_apart(stack, run, "a", run.task.encode(rows, model.processor))
    return stack


@pytest.mark.parametrize("name", CASES)
def test_every_task_passes_the_sites_own_proof(case: MakeCase, name: str) -> None:
    run, rows = case(name)
    assert prove(run, rows).rows_apart["a"].length is None
    assert prove(run, rows[:1]).rows_apart["a"].length is None, "one row is enough"


def test_batch_statistics_are_refused(case: MakeCase) -> None:
    run, rows = case("image_classification:ResNet")
    model = load_model(run)
    stack = AdapterStack.install(model)
    examples = run.task.encode(rows, model.processor)
    norms = [module for module in model.peft.modules() if isinstance(module, nn.BatchNorm2d)]
    norms[0].train()
    with refuses(ModelError, "batch-statistics") as caught:
        check_batch_statistics(model)
    assert "(BatchNorm2d)" in str(caught.value)
    with training_mode(stack, run, seed=0):
        check_batch_statistics(model)  # the trainer's own mode puts it right
    norms[0].running_mean = norms[0].running_var = None  # then even eval mode looks at the batch
    with refuses(ModelError, "batch-statistics"):
        check_rows_apart(stack, run, "a", examples)


# The layers by themselves.


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5)], ids=str)
def test_a_layer_used_several_times_and_checkpointed(shape: tuple[int, ...], reentrant: bool) -> None:
    sites, rows = 3, 4
    torch.manual_seed(0)
    per_sample = PerSample(rows)
    in_flight = InFlight(Layout((0, 1, 2), per_sample=per_sample))
    layer = StackedLinear(nn.Linear(5, 5), in_flight).double()
    layer.weight = nn.Parameter(torch.randn(sites, 5, 5, dtype=torch.float64))
    layer.bias = nn.Parameter(torch.randn(sites, 5, dtype=torch.float64))
    x = torch.randn(sites * rows, *shape, dtype=torch.float64, requires_grad=True)

    def twice(x: torch.Tensor) -> torch.Tensor:
        return layer(torch.tanh(layer(x)))

    checkpoint(twice, x, use_reentrant=reentrant).square().sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    given = x.grad
    arrays = {"weight": layer.weight, "bias": layer.bias}
    for site in range(sites):
        in_flight.layout = Layout((site,))
        found = per_sample.of_site(arrays, site, rows)
        for row in range(rows):
            part = x.detach()[site * rows + row][None].requires_grad_()
            grads = torch.autograd.grad(twice(part).square().sum(), [layer.weight, layer.bias, part])
            torch.testing.assert_close(found["weight"][row], grads[0][site])
            torch.testing.assert_close(found["bias"][row], grads[1][site])
            torch.testing.assert_close(given[site * rows + row][None], grads[2])  # type: ignore[index]


GEOMETRIES: dict[str, dict[str, Any]] = {
    "pointwise": {"kernel_size": 1, "bias": False},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "oblong": {"kernel_size": (3, 5), "stride": (1, 2), "padding": (0, 2)},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "groups": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1},
}


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("sites", [(0,), (2, 0)], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolutions_of_any_geometry(geometry: str, sites: tuple[int, ...], memory: Any) -> None:
    rows = 3
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, **GEOMETRIES[geometry]).double()
    per_sample = PerSample(rows)
    in_flight = InFlight(Layout(sites, per_sample=per_sample))
    layer = StackedConv2d(conv, in_flight)
    for name, array in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(torch.randn(3, *array.shape[1:], dtype=torch.float64)))
    x = (
        torch.randn(len(sites) * rows, 4, 9, 11, dtype=torch.float64)
        .to(memory_format=memory)
        .requires_grad_()
    )
    layer(x).square().sum().backward()
    arrays = dict(layer.named_parameters())
    for at, site in enumerate(sites):
        in_flight.layout = Layout((site,))
        found = per_sample.of_site(arrays, at, rows)
        for row in range(rows):
            part = x.detach()[at * rows + row][None].requires_grad_()
            grads = torch.autograd.grad(layer(part).square().sum(), [*arrays.values(), part])
            for name, gradient in zip(arrays, grads, strict=False):
                torch.testing.assert_close(found[name][row], gradient[site])
            torch.testing.assert_close(x.grad[at * rows + row][None], grads[-1])  # type: ignore[index]


def test_a_layer_that_sees_another_number_of_rows_is_refused() -> None:
    layout = InFlight(Layout((0,), per_sample=PerSample(4)))
    layer = StackedLinear(nn.Linear(3, 2), layout)
    layer(torch.zeros(8, 3)), layer(torch.zeros(4, 5, 3))  # windows or tokens of a row
    with refuses(ModelError, "not-by-rows"):
        layer(torch.zeros(6, 3))
    assert np.isfinite(layer.weight.detach().numpy()).all()
