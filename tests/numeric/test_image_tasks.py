"""Image tasks on small real models: PEFT's own figures, frozen statistics, rows and sites that do not mix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_images as small
import torch
from peft import PeftModel
from PIL import Image
from refusals import refuses
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from quorate.client.models.predictions import predict
from quorate.client.trainer.fit import Fitted, SiteTask, fit
from quorate.client.trainer.passes import training_mode
from quorate.client.trainer.stack import AdapterStack
from quorate.deploy.cli import run as run_command
from quorate.shared.adapters.adapter import Adapter, lora_layers, saved_modules
from quorate.shared.errors import AdapterError, DataError, ModelError
from quorate.shared.model.lora_model import load_model
from quorate.shared.progress import ignore_step
from quorate.shared.tasks.task import Row
from quorate.simulations.runner import simulate

TOLERANCE = 1e-5
CHANGES = {"horizontal_flip": 0.5, "rotation": 20, "scale": (0.8, 1.2), "brightness": 0.2}


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.save_model(tmp_path_factory.mktemp("resnet"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Row]]:
    folder = tmp_path_factory.mktemp("images")
    sizes = {"north": 14, "south": 3, "east": 9}
    return {name: small.make_rows(folder, count, seed) for seed, (name, count) in enumerate(sizes.items())}


def noisy(adapter: Adapter, seed: int) -> Adapter:
    draw = np.random.default_rng(seed)
    return adapter.map(lambda _, a: (a + 0.1 * draw.standard_normal(a.shape)).astype(np.float32))


def largest_difference(one: Adapter, other: Adapter) -> float:
    assert one.schema == other.schema
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def train(run: Any, sites: dict[str, list[Row]], starts: list[Adapter]) -> list[Fitted]:
    model = load_model(run)
    stack = AdapterStack.install(model)
    tasks = [
        SiteTask(name, run.task.weigh(run.task.encode(of, model.processor)), start)
        for (name, of), start in zip(sites.items(), starts, strict=True)
    ]
    return fit(stack, run, 1, tasks, frozenset(model.initial), ignore_step)


@pytest.mark.parametrize("architecture", small.ARCHITECTURES)
def test_a_stack_of_one_has_pefts_own_logits(
    tmp_path: Path, architecture: str, rows: dict[str, list[Row]]
) -> None:
    run = small.make_run(small.save_model(tmp_path, architecture))
    model = load_model(run)
    start = noisy(model.initial, 1)
    examples = run.task.encode(rows["east"], model.processor)
    batch = run.task.collate(examples, model.processor)
    model.write_adapter(start)
    with torch.no_grad():
        plain = model.peft(**batch.inputs).logits
        AdapterStack.install(model).load([start], ())
        stacked = model.peft(**batch.inputs).logits
    torch.testing.assert_close(plain, stacked, rtol=0, atol=TOLERANCE)
    assert plain.shape == (9, 3)


@pytest.mark.parametrize("architecture", small.ARCHITECTURES)
def test_every_layer_but_head_and_depthwise_ones_is_adapted(tmp_path: Path, architecture: str) -> None:
    model = load_model(small.make_run(small.save_model(tmp_path, architecture)))
    head = "classifier.1" if architecture == "ResNet" else "classifier"
    assert saved_modules(model.initial) == [head]
    adapted = {name.removeprefix("base_model.model.") for name in lora_layers(model.initial)}
    base = AutoModelForImageClassification.from_pretrained(
        tmp_path, num_labels=3, ignore_mismatched_sizes=True
    )
    layers = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert adapted == {n for n, m in layers.items() if getattr(m, "groups", 1) == 1} - {head}
    assert len(adapted) > 5


def test_one_site_is_a_plain_peft_loop(resnet: Path, rows: Any, plain_peft_loop: Any) -> None:
    run = small.make_run(resnet)
    start = noisy(load_model(run).initial, 0)
    (fitted,) = train(run, {"north": rows["north"]}, [start])
    assert largest_difference(fitted.adapter, start) > 1e-3, "nothing was trained"
    assert largest_difference(fitted.adapter, plain_peft_loop(run, rows["north"], start, 1)) < TOLERANCE


# AdamW turns the last bit of a gradient below its epsilon into a step.
STEADY = {"max_steps": None, "adam_epsilon": 1e-5}


@pytest.mark.parametrize(
    "sections",
    [
        {"training": STEADY},
        {"training": STEADY, "adapter": {"lora_dropout": 0.3}},
        {"training": STEADY, "task": {"augmentation": CHANGES}},
        {"training": STEADY, "task": {"class_weights": "balanced", "focal_gamma": 2, "label_smoothing": 0.1}},
    ],
    ids=["unequal-steps", "dropout", "augmentation", "losses"],
)
def test_stacked_sites_are_sites_alone(resnet: Path, rows: Any, sections: Any) -> None:
    run = small.make_run(resnet, **sections)
    initial = load_model(run).initial
    starts = [noisy(initial, seed) for seed in range(len(rows))]
    together = train(run, rows, starts)
    assert len({fitted.steps for fitted in together}) > 1, "sites must finish at different steps"
    for (name, of), start, fitted in zip(rows.items(), starts, together, strict=True):
        (alone,) = train(run, {name: of}, [start])
        assert largest_difference(fitted.adapter, alone.adapter) < TOLERANCE, name


def test_augmentation_and_dropout_change_training(resnet: Path, rows: Any) -> None:
    start = noisy(load_model(small.make_run(resnet)).initial, 0)
    plain, changed, dropped = (
        train(small.make_run(resnet, **sections), {"north": rows["north"]}, [start])[0].adapter
        for sections in ({}, {"task": {"augmentation": CHANGES}}, {"adapter": {"lora_dropout": 0.3}})
    )
    assert largest_difference(plain, changed) > 1e-4
    assert largest_difference(plain, dropped) > 1e-4


def test_statistics_of_batchnorm_stay_and_rows_do_not_mix(resnet: Path, rows: Any) -> None:
    run = small.make_run(resnet, training={"base_dropout": True})  # which puts the rest in training mode
    model = load_model(run)
    stack = AdapterStack.install(model)
    task = SiteTask("north", run.task.encode(rows["north"], model.processor), noisy(model.initial, 0))
    before = {name: buffer.clone() for name, buffer in model.peft.named_buffers()}
    assert any("running_mean" in name and buffer.abs().sum() > 0 for name, buffer in before.items())
    fit(stack, run, 1, [task], frozenset(model.initial), ignore_step)
    after = dict(model.peft.named_buffers())
    assert all(torch.equal(buffer, after[name]) for name, buffer in before.items())
    with training_mode(stack, run, seed=0):
        together = logits(model, run, task.examples[:5])
        alone = torch.cat([logits(model, run, [example]) for example in task.examples[:5]])
    torch.testing.assert_close(together, alone, rtol=0, atol=TOLERANCE)


def logits(model: Any, run: Any, examples: Any) -> torch.Tensor:
    found: torch.Tensor = run.task.forward(model.peft, run.task.collate(examples, model.processor))
    return found.detach()


@pytest.mark.slow
def test_a_small_resnet_with_random_weights_learns_through_its_convolutions(
    resnet: Path, rows: Any, tmp_path: Path
) -> None:
    run = small.make_run(
        resnet,
        training={"max_steps": 40, "per_device_train_batch_size": 16, "learning_rate": 5e-3},
        federation={"rounds": 1},
    )
    model = load_model(run)
    stack = AdapterStack.install(model)
    examples = run.task.encode(small.make_rows(tmp_path, 48, 7), model.processor)
    losses: list[float] = []
    lora_only = frozenset(name for name in model.initial if ".lora_" in name)
    task = SiteTask("north", examples, model.initial)
    fit(stack, run, 1, [task], lora_only, lambda event: losses.append(event.loss))
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])


def test_pixels_are_those_of_the_models_own_processor(resnet: Path, rows: Any) -> None:
    run = small.make_run(resnet)
    processor = AutoImageProcessor.from_pretrained(resnet, backend="pil")
    ours = run.task.collate(run.task.encode(rows["east"], processor), processor).inputs["pixel_values"]
    images = [Image.open(row.values["image"]) for row in rows["east"]]
    theirs = processor(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_oblong_images_are_stretched_cut_or_padded(resnet: Path, tmp_path: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(resnet, backend="pil")
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, :10], image[:, 10:20], image[:, 20:] = 50, 100, 200
    Image.fromarray(image).save(tmp_path / "a.png")
    row = Row({"image": str(tmp_path / "a.png"), "label": 0}, "a")

    def middle_row(resize: str) -> list[int]:
        run = small.make_run(resnet, task={"resize": resize, "image_size": 30})
        (example,) = run.task.encode([row], processor)
        assert example.features["image"].shape == (3, 30, 30)
        return [int(example.features["image"][0, y, x]) for y, x in ((15, 2), (15, 15), (15, 27), (2, 15))]

    assert middle_row("stretch") == [50, 100, 200, 100]
    assert middle_row("crop") == [100, 100, 100, 100]
    assert middle_row("pad") == [50, 100, 200, 0]


@pytest.fixture(scope="module")
def finished(
    resnet: Path, rows: dict[str, list[Row]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    run = small.make_run(
        resnet, adapter={"lora_dropout": 0.1}, federation={"rounds": 1, "quorum": 2}, task={"image_size": 24}
    )
    sites = {
        name: {"train": rows[name], "validation": rows["south"], "test": rows["south"]}
        for name in ("north", "east")
    }
    output = tmp_path_factory.mktemp("out") / "run"
    simulate(run, sites, output)
    return run, output


@pytest.mark.slow
def test_the_export_loads_in_peft_and_gives_the_runs_logits(
    finished: tuple[Any, Path], resnet: Path, rows: Any
) -> None:
    run, output = finished
    folder = output / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] is None and config["modules_to_save"] == ["classifier.1"]
    base = AutoModelForImageClassification.from_pretrained(resnet, num_labels=3, ignore_mismatched_sizes=True)
    loaded = PeftModel.from_pretrained(base, folder).eval()
    model = load_model(run)
    adapter = Adapter.from_bytes((folder / "adapter_model.safetensors").read_bytes())
    assert largest_difference(adapter, model.initial) > 1e-3, "nothing was trained"
    stack = AdapterStack.install(model)
    stack.load([adapter], ())
    examples = run.task.encode(rows["north"], model.processor)
    batch = run.task.collate(examples, model.processor)
    with torch.no_grad():
        theirs = loaded(**batch.inputs).logits
        ours = run.task.forward(model.peft, batch)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_predict_takes_image_files(finished: tuple[Any, Path], rows: Any, tmp_path: Path) -> None:
    _, output = finished
    (found,) = predict(output / "adapter", [rows["north"][0].values["image"]], images=True)
    assert found["label"] in small.LABELS and sum(found["scores"].values()) == pytest.approx(1)
    with refuses(DataError, "image-not-there") as caught:
        predict(output / "adapter", [str(tmp_path / "gone.png")], images=True)
    assert "gone.png" in str(caught.value)
    with refuses(AdapterError, "other-input") as caught:
        predict(output / "adapter", ["a cell"])
    assert "image_classification" in str(caught.value) and "text" in str(caught.value)


@pytest.mark.slow
def test_the_command_takes_an_image_or_a_folder_of_them(
    finished: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, output = finished
    small.make_rows(tmp_path / "new", 2, 5)
    (tmp_path / "empty").mkdir()
    assert run_command(["predict", str(output), str(tmp_path / "new"), "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["predictions"]
    assert [Path(each["image"]).name for each in answers] == ["5-0.png", "5-1.png"]
    assert run_command(["predict", str(output), answers[0]["image"]]) == 0
    assert answers[0]["label"] in capsys.readouterr().out
    assert run_command(["predict", str(output), str(tmp_path / "empty")]) == 2
    assert "holds no image" in capsys.readouterr().err


@pytest.mark.slow
def test_a_number_can_be_read_off_an_image(resnet: Path, rows: Any, tmp_path: Path) -> None:
    numbers = [Row({**row.values, "label": 2.5 * row.values["label"]}, row.source) for row in rows["north"]]
    run = small.make_run(resnet).model_dump()
    run["task"] = {"name": "image_regression", "target_mean": 2.5, "target_scale": 2}
    run["training"].update(max_steps=40, learning_rate=1e-2)
    run["federation"]["rounds"] = 1
    config = type(small.make_run(resnet)).model_validate(run)
    losses: list[float] = []
    model = load_model(config)
    task = SiteTask("north", config.task.encode(numbers, model.processor), model.initial)
    stack = AdapterStack.install(model)
    fit(stack, config, 1, [task], frozenset(model.initial), lambda event: losses.append(event.loss))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_a_size_the_model_does_not_take_is_refused(tmp_path: Path) -> None:
    run = small.make_run(small.save_model(tmp_path, "ViT"), task={"image_size": 48})
    with refuses(ModelError, where="task.image_size") as caught:
        load_model(run)
    assert "48 by 48" in str(caught.value)


def test_dilated_convolutions_are_left_out_and_refused_by_name(tmp_path: Path, resnet: Path) -> None:
    from quorate.shared.model.lora_model import attach_lora

    class Dilated(nn.Module):
        base_model_prefix = "body"

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2), nn.Conv2d(4, 4, 1))
            self.head = nn.Linear(4, 3)

    run = small.make_run(resnet)
    assert run.task.default_targets(Dilated()) == ("body.1",)
    named = small.make_run(resnet, adapter={"target_modules": ["body.0"]})
    with refuses(ModelError, "dilated") as caught:
        attach_lora(Dilated(), named.adapter, named.task)
    assert "body.0 " in str(caught.value)
