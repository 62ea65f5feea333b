"""The loss of the DETR family, image by image.

The usual criterion divides by the boxes of the batch, so that one image's boxes would change another's
gradient; here each image is a batch of its own for it.

Source: Carion et al. 2020, arXiv:2005.12872, as transformers has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Detections:
    """What a model says of a batch.

    Args:
        logits: [rows, queries, labels + 1]; the last is `no object`.
        boxes: [rows, queries, 4]: centre x, centre y, width, height as shares of the image.
    """

    logits: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class Costs:
    """Weights of label, coordinates and generalised overlap in the matching and in the loss."""

    class_cost: float
    bbox_cost: float
    giou_cost: float
    bbox_loss_coefficient: float
    giou_loss_coefficient: float
    eos_coefficient: float


def hungarian_loss(found: Detections, targets: Sequence[Mapping[str, Tensor]], costs: Costs) -> Tensor:
    """Return each image's loss, [rows], in float32: divided by its own boxes, by 1 where it has none.

    Args:
        found: what the model says.
        targets: `class_labels` [n] and `boxes` [n, 4] (as in Detections) of each image.
        costs: weights.
    Returns: NaN for an image of which the model says a NaN or infinity; the others are not touched by it.
    """
    from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

    labels = found.logits.shape[-1] - 1
    matcher = HungarianMatcher(costs.class_cost, costs.bbox_cost, costs.giou_cost)
    criterion = ImageLoss(matcher, labels, costs.eos_coefficient, ["labels", "boxes"])  # type: ignore[no-untyped-call]
    criterion.to(found.logits.device)
    each = zip(found.logits.float(), found.boxes.float(), targets, strict=True)
    return torch.stack([_of_image(criterion, costs, *image) for image in each])


def _of_image(
    criterion: nn.Module, costs: Costs, logits: Tensor, boxes: Tensor, target: Mapping[str, Tensor]
) -> Tensor:
    if not (logits.isfinite().all() and boxes.isfinite().all()):
        # The criterion would raise, for the whole batch: a site that diverges must not stop its neighbours.
        return (logits.sum() + boxes.sum()) * math.nan
    parts = criterion({"logits": logits[None], "pred_boxes": boxes[None]}, [target])
    total: Tensor = (
        parts["loss_ce"]
        + costs.bbox_loss_coefficient * parts["loss_bbox"]
        + costs.giou_loss_coefficient * parts["loss_giou"]
    )
    return total
