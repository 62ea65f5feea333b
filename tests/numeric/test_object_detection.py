"""Object detection: losses are each image's own, boxes follow pixels, figures are pycocotools'."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from refusals import refuses

pytest.importorskip("pycocotools", reason="needs the extra `detection`")
pytest.importorskip("scipy", reason="needs the extra `detection`")
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from small_detector import make_rows, save_model
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from quorate.client.site.site import Site
from quorate.client.trainer.evaluate import evaluate, forward
from quorate.client.trainer.fit import SiteTask, fit
from quorate.client.trainer.stack import AdapterStack
from quorate.server.rounds.evaluation import summarise
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import DataError, ModelError, ProtocolError
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.model.lora_model import load_model
from quorate.shared.progress import ignore_step
from quorate.shared.tasks import ObjectDetection
from quorate.shared.tasks.task import Batch, Row
from quorate.shared.tasks.vision.augmentation import Augmentation
from quorate.shared.tasks.vision.detection_loss import Detections

LABELS = ("disc", "square", "bar")


def task(**options: Any) -> ObjectDetection:
    return ObjectDetection(name="object_detection", labels=LABELS, **{"image_size": (32, 48), **options})


@pytest.fixture(scope="module")
def tiny_yolos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny-yolos"))


@pytest.fixture
def make_run_of(tiny_yolos: Path) -> Callable[..., RunConfig]:
    def make(**options: Any) -> RunConfig:
        return RunConfig.model_validate(
            {
                "name": "boxes",
                "task": task(**options),
                "data": "shapes",
                "model": {"model_name_or_path": str(tiny_yolos)},
                "adapter": {"r": 2, "lora_alpha": 4},
                "training": {"max_steps": 2, "per_device_train_batch_size": 3, "learning_rate": 1e-2},
                "federation": {"rounds": 2, "grace_seconds": 0},
            }
        )

    return make


def drawn(counts: list[int], seed: int = 0, queries: int = 9) -> tuple[Detections, list[dict[str, Any]]]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(counts), queries, len(LABELS) + 1, generator=generator)
    boxes = torch.rand(len(counts), queries, 4, generator=generator) * 0.5 + 0.2
    targets = [
        {
            "class_labels": torch.randint(3, (n,), generator=generator),
            "boxes": torch.rand(n, 4, generator=generator) * 0.5 + 0.2,
        }
        for n in counts
    ]
    return Detections(logits, boxes), targets


def loss_of(found: Detections, targets: list[Any], **options: Any) -> torch.Tensor:
    return task(**options).loss(found, Batch({}, targets, torch.ones(len(targets))))


@pytest.mark.parametrize(
    "costs", [{}, {"class_cost": 2.0, "bbox_loss_coefficient": 3.0, "giou_loss_coefficient": 0.5}]
)
def test_each_images_loss_is_that_of_transformers_alone(costs: dict[str, float]) -> None:
    found, targets = drawn([3, 0, 1, 9, 12])  # none, and more than queries, are nothing special
    ours = loss_of(found, targets, **costs)

    class Config:
        num_labels, auxiliary_loss, eos_coefficient = len(LABELS), False, 0.1
        class_cost, bbox_cost, giou_cost = costs.get("class_cost", 1.0), 5.0, 2.0
        bbox_loss_coefficient = costs.get("bbox_loss_coefficient", 5.0)
        giou_loss_coefficient = costs.get("giou_loss_coefficient", 2.0)

    for i, target in enumerate(targets):
        logits, boxes = found.logits[i : i + 1], found.boxes[i : i + 1]
        theirs, *_ = ForObjectDetectionLoss(logits, [target], torch.device("cpu"), boxes, Config)
        torch.testing.assert_close(ours[i], theirs)


def test_other_images_change_neither_an_images_loss_nor_its_gradient() -> None:
    found, targets = drawn([3, 0, 5])
    others, their_targets = drawn([8, 1, 0], seed=1)
    mixed = Detections(
        torch.cat([found.logits[:1], others.logits]), torch.cat([found.boxes[:1], others.boxes])
    )
    mine, theirs = loss_of(found, targets), loss_of(mixed, [targets[0], *their_targets])
    assert float(mine[0]) == pytest.approx(float(theirs[0]), abs=1e-6)
    together = _gradient(found, targets)
    for i in range(3):
        alone = Detections(found.logits[i : i + 1], found.boxes[i : i + 1])
        for whole, part in zip(together, _gradient(alone, targets[i : i + 1]), strict=True):
            torch.testing.assert_close(whole[i : i + 1], part, atol=1e-6, rtol=1e-5)


def _gradient(found: Detections, targets: list[Any]) -> list[torch.Tensor]:
    leaves = [found.logits.clone().requires_grad_(), found.boxes.clone().requires_grad_()]
    loss_of(Detections(*leaves), targets).sum().backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def test_an_image_that_diverges_leaves_its_neighbours_alone() -> None:
    found, targets = drawn([3, 2])
    whole = loss_of(found, targets)
    broken = Detections(found.logits, found.boxes.clone())
    broken.boxes[0, 0, 0] = float("nan")
    each = loss_of(broken, targets)
    assert each[0].isnan() and each[1] == whole[1]


def test_gradient_of_a_batch_is_the_sum_of_its_images(make_run_of: Any, tmp_path: Path) -> None:
    """Through the whole model: what differentially private training and stacked sites stand on."""
    run = make_run_of()
    model = load_model(run)
    examples = run.task.encode(make_rows(tmp_path, 6, 0), model.processor)

    def gradient(chosen: Any) -> torch.Tensor:
        model.peft.zero_grad()
        batch = run.task.collate(chosen, model.processor)
        run.task.loss(run.task.forward(model.peft, batch), batch).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.peft.parameters() if p.requires_grad])

    together = gradient(examples)
    apart = torch.stack([gradient([each]) for each in examples]).sum(dim=0)
    assert float((together - apart).norm() / together.norm()) < 1e-5
    assert float(together.norm()) > 0.1


def test_stacked_sites_end_where_sites_alone_end(make_run_of: Any, tmp_path: Path) -> None:
    run = make_run_of(augmentation={"horizontal_flip": 0.5})
    model = load_model(run)
    stack = AdapterStack.install(model)
    sites = [
        SiteTask(name, run.task.encode(make_rows(tmp_path, rows, seed), model.processor), model.initial)
        for name, rows, seed in (("a", 7, 0), ("b", 4, 1), ("c", 5, 2))
    ]
    trainable = frozenset(model.initial)
    together = fit(stack, run, 1, sites, trainable, ignore_step)
    for site, stacked in zip(sites, together, strict=True):
        alone = fit(stack, run, 1, [site], trainable, ignore_step)[0]
        for name, array in alone.adapter.items():
            np.testing.assert_allclose(stacked.adapter[name], array, atol=1e-5)
        moved = alone.adapter.minus(model.initial).l2_norm
        assert moved > 0.1 and stacked.metrics["train_loss"] == pytest.approx(alone.metrics["train_loss"])


def test_all_of_a_default_adapter_is_trained(make_run_of: Any) -> None:
    names = set(load_model(make_run_of()).initial)
    for part in ("query", "value", "attention.output.dense", "intermediate.dense", "vit.encoder.layer.1."):
        assert any(part in name and "lora_A" in name for name in names), part
    heads = {name for name in names if "lora" not in name}
    assert len(heads) == 12 and all("class_labels" in name or "bbox_predictor" in name for name in heads)


def test_map_of_sites_is_pycocotools_own(make_run_of: Any, tmp_path: Path) -> None:
    """A model's own detections: the sites' outcomes pooled, and everything in one COCOeval."""
    run = make_run_of()
    model = load_model(run)
    stack = AdapterStack.install(model)
    sites = {name: make_rows(tmp_path, 11, seed) for seed, name in enumerate(("a", "b", "c"))}
    encoded = {name: run.task.encode(rows, model.processor) for name, rows in sites.items()}
    site = SiteTask("a", [e for each in encoded.values() for e in each], model.initial)
    quick = run.training.model_copy(update={"max_steps": 100})
    longer = run.model_copy(update={"training": quick})
    adapter = fit(stack, longer, 1, [site], frozenset(model.initial), ignore_step)[0].adapter
    measured = {name: evaluate(stack, run, adapter, each) for name, each in encoded.items()}
    for each in measured.values():
        run.task.check_outcomes(each)
    found = summarise(run.task, "test", measured, intervals=True).pooled
    theirs = _coco(run, stack, adapter, sites, encoded)
    ours = [found[name] for name in ("map", "map_50", "map_75")]
    assert ours == pytest.approx(theirs[:3].tolist(), abs=1e-3), "scores are rounded to 1/10000"
    assert ours[1] > 0.01, "something must be found for this to prove anything"
    assert sum(each["support"] for each in found["per_class"].values()) == sum(
        len(row.values["objects"]) for rows in sites.values() for row in rows
    )
    assert found["map"] == pytest.approx(np.nanmean([each["ap"] for each in found["per_class"].values()]))


def _coco(run: Any, stack: Any, adapter: Any, sites: Any, encoded: Any) -> Any:
    everything = run.task.model_copy(update={"shown_threshold": 0.0})
    truth, results, boxes = COCO(), [], []
    images = [(name, index) for name, rows in sites.items() for index in range(len(rows))]
    for name, rows in sites.items():
        for index, row in enumerate(rows):
            for label, *box in row.values["objects"]:
                boxes.append(
                    {
                        "id": len(boxes) + 1,
                        "image_id": images.index((name, index)),
                        "category_id": label,
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                    }
                )
        for indices, batch, logits in forward(stack, run, adapter, encoded[name]):
            said = everything.predictions(logits, batch, stack.model.processor)
            for index, each in zip(indices, said, strict=True):
                results += [
                    {
                        "image_id": images.index((name, index)),
                        "category_id": LABELS.index(one["label"]),
                        "bbox": one["box"],
                        "score": one["score"],
                    }
                    for one in each["objects"]
                ]
    truth.dataset = {
        "images": [{"id": i} for i in range(len(images))],
        "categories": [{"id": i} for i in range(len(LABELS))],
        "annotations": boxes,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        coco = COCOeval(truth, truth.loadRes(results), "bbox")
        coco.evaluate()
        coco.accumulate()
        coco.summarize()
    return coco.stats


def test_no_interval_is_made_of_single_boxes(make_run_of: Any) -> None:
    outcomes = Outcomes(values=((0, 0, 9000, 1023), (1, 0, 0, 0)), counts=(2, 3), num_rows=2, loss_sum=4.0)
    found = summarise(task(), "test", {"a": outcomes}, intervals=True)
    assert found.intervals == {}
    assert found.pooled["loss"] == 2.0 and found.pooled["map"] == pytest.approx(67 / 101)
    assert np.isnan(found.pooled["per_class"]["bar"]["ap"]), "no true bar: nothing is known"


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (((0, 0, 1),), "wrong-width"),
        (((2, 0, 0, 0),), "impossible-figures"),
        (((0, 3, 1, 0),), "impossible-figures"),
        (((0, 0, 10001, 0),), "impossible-figures"),
        (((0, 0, 1, 1024),), "impossible-figures"),
        (((1, 0, 1, 0),), "impossible-figures"),
        (((0, 0, 1, 2), (0, 0, 2, 2), (1, 0, 0, 0)), "too-many-right"),
        (((0, 0, 1, 0), (0, 0, 2, 0), (0, 1, 2, 0)), "too-many-detections"),
    ],
)
def test_outcomes_that_cannot_be_are_refused(values: Any, kind: str) -> None:
    outcomes = Outcomes(values=values, counts=(1,) * len(values), num_rows=1)
    with refuses(ProtocolError, kind):
        task(max_detections=2).check_outcomes(outcomes)


def test_boxes_follow_the_pixels(make_run_of: Any, tmp_path: Path) -> None:
    """Each box holds the colour of its label, and nothing of it lies outside, whatever is drawn."""
    run = make_run_of(
        augmentation={
            "horizontal_flip": 0.5,
            "vertical_flip": 0.5,
            "scale": [0.8, 1.2],
            "translation": 0.2,
            "padding_mode": "zeros",
        }
    )
    rows = [
        row
        for row in make_rows(tmp_path, 60, 5)
        if sorted({label for label, *_ in row.values["objects"]}) == [0, 1, 2][: len(row.values["objects"])]
    ]
    processor = load_model(run).processor
    examples = run.task.encode([row for row in rows if row.values["objects"]], processor)
    changed = run.task.augment(examples, np.random.default_rng(0), processor)
    seen = 0
    for before, after in zip(examples, changed, strict=True):
        assert len(after.target["boxes"]) == len(after.target["class_labels"])
        if len(before.target["boxes"]) != 1 or len(after.target["boxes"]) != 1:
            continue
        label = int(after.target["class_labels"][0])
        bright = np.argwhere(after.features["image"][label] > 127)
        (low_y, low_x), (high_y, high_x) = bright.min(axis=0), bright.max(axis=0) + 1
        x, y, width, height = after.target["boxes"][0].numpy() * [48, 32, 48, 32]
        found = [x - width / 2, x + width / 2, y - height / 2, y + height / 2]
        np.testing.assert_allclose(found, [low_x, high_x, low_y, high_y], atol=1.2)
        seen += not np.array_equal(before.features["image"], after.features["image"])
    assert seen >= 3


def test_a_mirror_at_the_edge_is_refused() -> None:
    with pytest.raises(ValidationError) as caught:
        task(augmentation=Augmentation(rotation=10))
    (error,) = caught.value.errors()
    assert error["loc"] == ("augmentation",) and "padding_mode: zeros" in error["msg"]
    assert task(augmentation=Augmentation(horizontal_flip=0.5)).augmentation.changes


def test_boxes_at_the_edge_are_cut_and_beyond_it_refused(make_run_of: Any, tmp_path: Path) -> None:
    run = make_run_of()
    processor = load_model(run).processor
    (row,) = make_rows(tmp_path, 1, 0)

    def encoded(*boxes: tuple[float, float, float, float]) -> Any:
        objects = [(1, *box) for box in boxes]
        return run.task.encode(
            [Row({**row.values, "objects": objects}, "cells.json: image 7.png")], processor
        )

    (example,) = encoded((-0.5, 0, 30.5, 40.6), (0, 10, 60, 20))
    np.testing.assert_allclose(example.target["boxes"], [[0.25, 0.5, 0.5, 1], [0.5, 0.5, 1, 0.5]])
    for box in ((50.0, 0.0, 12.0, 9.0), (0.0, -2.0, 5.0, 5.0), (60.2, 5.0, 0.5, 5.0)):
        with refuses(DataError, "box-outside", where="cells.json") as caught:
            encoded((1, 1, 2, 2), box)
        assert all(said in str(caught.value) for said in (": image 7.png: ", "object 2 ", "60 by 40"))


def test_predictions_are_in_the_images_own_pixels() -> None:
    logits = torch.full((1, 2, 4), -5.0)
    logits[0, 0, 1], logits[0, 1, 3] = 5.0, 5.0
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.25], [0.1, 0.1, 0.1, 0.1]]])
    batch = Batch({}, [{"size": torch.tensor([200.0, 80.0])}], torch.ones(1))
    ((found,),) = (each["objects"] for each in task().predictions(Detections(logits, boxes), batch, None))
    assert found["label"] == "square" and found["score"] > 0.99
    assert found["box"] == pytest.approx([50, 30, 100, 20])


def test_a_model_that_cannot_be_trained_so_is_refused(make_run_of: Any) -> None:
    with refuses(ModelError, "part-of-a-patch", where="task.image_size [36, 48]") as caught:
        load_model(make_run_of(image_size=(36, 48)))
    assert "multiples of 8" in str(caught.value)

    class Other:
        class config:
            model_type = "rt_detr"

    with refuses(ModelError, "other-loss") as caught:
        task().prepare_processor(None, Other, None, "folder")
    assert " rt_detr" in str(caught.value)


@pytest.mark.parametrize("module", ["pycocotools.cocoeval", "scipy.optimize"])
def test_a_library_that_is_missing_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with refuses(ModelError, "no-detection-extra") as caught:
        task().prepare_processor(None, None, None, "folder")
    assert module.split(".")[0] in str(caught.value)
    assert "pip install 'quorate[detection]'" in str(caught.value)


def test_a_site_says_what_it_has(make_run_of: Any, tmp_path: Path) -> None:
    rows = make_rows(tmp_path, 10, 0)
    site = Site({"a": {"train": rows, "validation": rows[:3], "test": rows[:2]}})
    run = site.prepare(make_run_of())
    examples = run.task.encode(rows, load_model(run).processor)
    counts = run.task.label_counts(examples)
    assert list(counts) == list(LABELS) and sum(counts.values()) == 2 * (1 + 2 + 3 + 4)
    assert run.task.notes(rows, examples) == ("2 of 10 training images show no object",)


def test_detr_is_of_the_same_family(tmp_path: Path) -> None:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
    from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"],
    )
    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=5,
    )
    DetrForObjectDetection(config).save_pretrained(tmp_path)
    DetrImageProcessorPil().save_pretrained(tmp_path)
    run = RunConfig.model_validate(
        {
            "name": "detr",
            "task": task(image_size=(64, 64)),
            "data": "shapes",
            "model": {"model_name_or_path": str(tmp_path)},
            "training": {"max_steps": 1, "per_device_train_batch_size": 2},
            "federation": {"rounds": 1},
        }
    )
    model = load_model(run)
    stack = AdapterStack.install(model)
    examples = run.task.encode(make_rows(tmp_path / "images", 4, 0), model.processor)
    site = SiteTask("a", examples, model.initial)
    fitted = fit(stack, run, 1, [site], frozenset(model.initial), ignore_step)[0]
    assert fitted.adapter.minus(model.initial).l2_norm > 0
    assert evaluate(stack, run, fitted.adapter, examples).rows == 4


@pytest.mark.slow
def test_a_simulation_shows_what_is_found_where_it_is_asked_to(make_run_of: Any, tmp_path: Path) -> None:
    from quorate.server.tracking.records import Sample
    from quorate.simulations.runner import SimulationOptions, simulate

    rows = {
        name: {split: make_rows(tmp_path / "images", 6, seed) for split in ("train", "validation", "test")}
        for seed, name in enumerate(("a", "b"))
    }
    run = make_run_of(shown_threshold=0.0)
    summary = simulate(run, rows, tmp_path / "out", options=SimulationOptions(samples=2))
    assert summary.best is not None and summary.best.test is not None
    assert summary.best.test.intervals == {}
    lines = (tmp_path / "out/samples/samples.jsonl").read_text().splitlines()
    shown = [Sample.model_validate_json(line) for line in lines]
    assert [len(each.true) for each in shown] == [0, 1] and all(len(each.found) == 7 for each in shown)
    x, y, width, height = shown[1].true[0].box
    picture = np.asarray(Image.open(tmp_path / "out/samples/2.png"))
    inside = picture[int(y) : int(y + height), int(x) : int(x + width)]
    assert inside.max(axis=2).min() == 255 and picture.max(axis=2).sum() == inside.max(axis=2).sum()
    text = (tmp_path / "out/report.html").read_text()
    assert "What it finds" in text and "AP at overlap 0.5" in text
