"""Object detection: labels and boxes of what an image shows, with models of the DETR family (YOLOS, DETR).

The loss is taken image by image (`quorate.shared.tasks.vision.detection_loss`); average precision comes from
counts of outcomes, without a box leaving its site (`quorate.shared.metrics.detection_metrics`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from quorate.shared.errors import DataError, ModelError
from quorate.shared.metrics.detection_metrics import WIDTH, average_precision, check, import_extra, match
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.tasks.classification import DIFFER, Label, label_kwargs
from quorate.shared.tasks.task import Batch, Example, Kind, Metrics, Row, Task
from quorate.shared.tasks.vision.augmentation import Augmentation, Change
from quorate.shared.tasks.vision.detection_loss import Costs, Detections, hungarian_loss
from quorate.shared.tasks.vision.image_task import decode, pixel_values

HEADS = ("class_labels_classifier", "bbox_predictor")
MODEL_TYPES = ("yolos", "detr", "table-transformer")
"""Models with this loss: one softmax over the labels and `no object`, and boxes per query."""
_VISIBLE = 0.3
"""Which share of a box must stay in a changed image for the box to be kept."""
_SLACK = 1.0
"""How far a box may stand out of its image before it is refused [pixels]; it is cut at the edge."""


class ObjectDetection(Task):
    """Find objects in images. Columns: `image`, and `objects` (label id, x, y, width, height in pixels)."""

    default_metric: ClassVar[str] = "map"
    counted: ClassVar[str] = "boxes"
    peft_task_type: ClassVar[str | None] = None
    auto_class: ClassVar[str] = "AutoModelForObjectDetection"
    processor_class: ClassVar[str] = "AutoImageProcessor"

    name: Literal["object_detection"]
    """The task."""
    labels: Annotated[tuple[Label, ...], Field(min_length=1), DIFFER]
    """Label names, in the order of their ids."""
    image_size: tuple[int, int] = Field((512, 512))
    """Height and width [pixels] to which every image is resized, whatever its own shape."""
    max_detections: int = Field(100, ge=1, le=1000)
    """Most detections of an image that are measured, the best scores first; COCO's measure has 100."""
    score_threshold: float = Field(0.0, ge=0, lt=1)
    """Detections below this score are not measured: evaluations get smaller, and mAP a little lower."""
    shown_threshold: float = Field(0.5, ge=0, le=1)
    """Lowest score of a detection that predictions name and pictures show."""
    augmentation: Augmentation = Augmentation(padding_mode="zeros")
    """Random changes to training images and their boxes; a box of which less than 0.3 stays in the image is
    dropped."""
    class_cost: float = Field(1.0, ge=0)
    """Weight of a label's probability when detections are matched to true boxes."""
    bbox_cost: float = Field(5.0, ge=0)
    """Weight of the distance of coordinates in that."""
    giou_cost: float = Field(2.0, ge=0)
    """Weight of the generalised overlap in that."""
    bbox_loss_coefficient: float = Field(5.0, ge=0)
    """Weight of the distance of coordinates in the loss."""
    giou_loss_coefficient: float = Field(2.0, ge=0)
    """Weight of the generalised overlap in the loss."""
    eos_coefficient: float = Field(0.1, gt=0)
    """Weight of `no object` in the loss over labels."""

    @field_validator("image_size")
    @classmethod
    def _an_image_can_have_that_size(cls, size: tuple[int, int]) -> tuple[int, int]:
        if not all(16 <= side <= 4096 for side in size):
            raise ValueError("height and width must be from 16 to 4096 pixels")
        return size

    @field_validator("augmentation")
    @classmethod
    def _no_objects_in_the_mirror(cls, change: Augmentation) -> Augmentation:
        moves = change.rotation or change.translation or change.scale[0] < 1
        if moves and change.padding_mode == "reflection":
            raise ValueError(
                "the mirror image beyond an edge shows objects that have no boxes; set padding_mode: zeros"
            )
        return change

    @property
    def columns(self) -> Mapping[str, Kind]:
        return {"image": "image", "objects": "objects"}

    @property
    def metrics_for_best_model(self) -> tuple[str, ...]:
        return ("map", "map_50", "map_75")

    def model_kwargs(self) -> dict[str, Any]:
        return label_kwargs(self.labels)

    def default_targets(self, base: nn.Module) -> tuple[str, ...] | str | None:
        """Return every linear layer outside the heads."""
        return tuple(
            name
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear) and not name.startswith(HEADS)
        )

    def head_modules(self, base: nn.Module) -> tuple[str, ...] | None:
        return HEADS

    def prepare_processor(self, processor: Any, base: Any, pad_token: str | None, name: str) -> Any:
        """Check that the model has the loss this task trains, and the libraries for it."""
        for module in ("scipy.optimize", "pycocotools.cocoeval"):
            import_extra(module)
        if base.config.model_type not in MODEL_TYPES:
            raise ModelError(
                f"{name} is a {base.config.model_type}, which is trained with another loss than this task's; "
                f"use one of {', '.join(MODEL_TYPES)}.",
                kind="other-loss",
            )
        patch = getattr(base.config, "patch_size", 1)
        if isinstance(patch, int) and any(side % patch for side in self.image_size):
            raise ModelError(
                f"task.image_size {list(self.image_size)}: {name} sees patches of {patch} pixels and not "
                f"what is left over; use multiples of {patch}.",
                kind="part-of-a-patch",
            )
        return processor

    def encode(self, rows: Sequence[Row], processor: Any, *, labelled: bool = True) -> list[Example]:
        """Open and resize each image; the target has `class_labels` [n], `boxes` [n, 4] and `size` [2].

        Boxes become centre x, centre y, width and height as shares of the image; `size` is its own width and
        height [pixels].
        """
        return [self._example(row, processor, labelled) for row in rows]

    def _example(self, row: Row, processor: Any, labelled: bool) -> Example:
        image = decode(row.values["image"], row.source)
        objects = row.values["objects"] if labelled else []
        height, width = self.image_size
        pixels = np.asarray(image.resize((width, height), processor.resample), np.uint8).transpose(2, 0, 1)
        target = {
            "class_labels": torch.tensor([each[0] for each in objects], dtype=torch.int64),
            "boxes": self._boxes(objects, image.size, row.source),
            "size": torch.tensor(image.size, dtype=torch.float32),
        }
        return Example({"image": np.ascontiguousarray(pixels)}, target)

    def _boxes(self, objects: Sequence[Any], size: tuple[int, int], source: str) -> Tensor:
        """Return boxes as shares of the image, [n, 4], cut at its edges.

        Raises: DataError: a box stands out of the image by more than a pixel, or lies outside.
        """
        boxes = np.array([each[1:] for each in objects], dtype=np.float64).reshape(-1, 4)
        limit = np.array(size, dtype=np.float64)
        low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        out = ((low < -_SLACK) | (high > limit + _SLACK)).any(axis=1)
        low, high = low.clip(0, limit), high.clip(0, limit)
        out |= (high <= low).any(axis=1)
        if out.any():
            number = int(out.argmax())
            x, y, width, height = boxes[number]
            raise DataError(
                f"{source}: object {number + 1} at x {x:g}, y {y:g}, {width:g} wide and {height:g} high is "
                f"not within the image of {size[0]} by {size[1]} pixels; correct the box or remove it.",
                kind="box-outside",
            )
        shares = np.concatenate([(low + high) / 2, high - low], axis=1) / np.tile(limit, 2)
        return torch.from_numpy(shares.astype(np.float32))

    def notes(self, rows: Sequence[Row], examples: Sequence[Example]) -> tuple[str, ...]:
        """Say how many training images show no object."""
        empty = sum(not len(each.target["class_labels"]) for each in examples)
        return (f"{empty} of {len(examples)} training images show no object",) if empty else ()

    def label_counts(self, examples: Sequence[Example]) -> dict[str, int]:
        ids = [index for each in examples for index in each.target["class_labels"].tolist()]
        return {label: ids.count(index) for index, label in enumerate(self.labels)}

    def augment(
        self, examples: Sequence[Example], draw: np.random.Generator, processor: Any
    ) -> list[Example]:
        """Change each image as `augmentation` says, and its boxes with it."""
        if not self.augmentation.changes:
            return list(examples)
        return [_changed(each, self.augmentation.draw(draw)) for each in examples]

    def length(self, example: Example) -> int:
        return 0

    def collate(self, examples: Sequence[Example], processor: Any, length: int | None = None) -> Batch:
        """Normalise images as the model's processor does; targets stay a list, one per image."""
        pixels = pixel_values([each.features["image"] for each in examples], processor)
        weights = torch.tensor([each.weight for each in examples], dtype=torch.float32)
        return Batch({"pixel_values": pixels}, [each.target for each in examples], weights)

    def forward(self, model: Any, batch: Batch) -> Detections:
        out = model(**batch.inputs)
        return Detections(out.logits, out.pred_boxes)

    def loss(self, logits: Detections, batch: Batch) -> Tensor:
        """Return each image's own Hungarian loss, [rows]; see `detection_loss`."""
        costs = Costs(**{each.name: getattr(self, each.name) for each in fields(Costs)})
        return hungarian_loss(logits, batch.targets, costs) * batch.weights

    def outcomes(self, logits: Detections, batch: Batch) -> npt.NDArray[np.int64]:
        """Return one outcome per detection and per true box; see `detection_metrics`."""
        found = [np.zeros((0, WIDTH), dtype=np.int64)]
        for (labels, boxes, scores), target in zip(self._best(logits), batch.targets, strict=True):
            true_labels = target["class_labels"].cpu().numpy()
            true_boxes = _corners(target["boxes"].double().cpu().numpy())
            found.append(match(true_labels, true_boxes, labels, boxes, scores, len(self.labels)))
        return np.concatenate(found)

    def _best(self, logits: Detections) -> list[tuple[Any, Any, Any]]:
        """Return label ids [n], boxes [n, 4] (x, y, width, height as shares) and scores [n] of each image."""
        scores, labels = (each.cpu().numpy() for each in logits.logits.double().softmax(-1)[..., :-1].max(-1))
        boxes = _corners(logits.boxes.double().cpu().numpy())
        chosen = []
        for index in range(len(scores)):
            order = np.argsort(-scores[index], kind="stable")[: self.max_detections]
            order = order[scores[index][order] >= self.score_threshold]
            chosen.append((labels[index][order], boxes[index][order], scores[index][order]))
        return chosen

    def check_outcomes(self, outcomes: Outcomes) -> None:
        """Raise ProtocolError unless these can be outcomes of that many images."""
        if outcomes.values:
            check(*outcomes.arrays(), len(self.labels), outcomes.rows * self.max_detections)

    def metrics(self, outcomes: Outcomes) -> Metrics:
        """Return map (over overlaps .50 to .95), map_50, map_75, loss and per_class, as COCO defines them.

        Labels without a true box do not enter the mean; areas are not told apart.
        """
        if not outcomes.rows:
            return {}
        values, counts = outcomes.arrays()
        precision, support = average_precision(values.reshape(-1, WIDTH), counts, len(self.labels))
        present = precision[support > 0]
        at = {"map": slice(None), "map_50": slice(0, 1), "map_75": slice(5, 6)}
        result: Metrics = {
            name: float(present[:, where].mean()) if len(present) else math.nan for name, where in at.items()
        }
        result["loss"] = outcomes.loss_sum / outcomes.rows
        result["per_class"] = {
            label: {
                "ap": float(precision[i].mean()),
                "ap50": float(precision[i, 0]),
                "support": int(support[i]),
            }
            for i, label in enumerate(self.labels)
        }
        return result

    def predictions(self, logits: Detections, batch: Batch, processor: Any) -> list[dict[str, Any]]:
        """Return each image's objects from `shown_threshold` on: label, score and box in its pixels."""
        shown = []
        for (labels, boxes, scores), target in zip(self._best(logits), batch.targets, strict=True):
            pixels = boxes * np.tile(target["size"].cpu().numpy(), 2)
            shown.append(
                {
                    "objects": [
                        {"label": self.labels[label], "score": float(score), "box": box.tolist()}
                        for label, score, box in zip(labels, scores, pixels, strict=True)
                        if score >= self.shown_threshold
                    ]
                }
            )
        return shown


def _changed(example: Example, change: Change) -> Example:
    image, target = example.features["image"], example.target
    height, width = image.shape[1:]
    frame = np.array([width, height] * 2)
    boxes, left = change.boxes(_corners(target["boxes"].double().numpy()) * frame, height, width)
    kept = torch.from_numpy(left >= _VISIBLE)
    centred = np.concatenate([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], axis=1) / frame
    moved = {
        **target,
        "boxes": torch.from_numpy(centred).float()[kept],
        "class_labels": target["class_labels"][kept],
    }
    return replace(example, features={"image": change.image(image)}, target=moved)


def _corners(boxes: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return x, y, width, height from centre x, centre y, width, height, [..., 4]."""
    return np.concatenate([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., 2:]], axis=-1)
