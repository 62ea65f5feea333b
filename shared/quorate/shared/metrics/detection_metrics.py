"""Average precision of boxes as COCO defines it, in two halves: matching at a site, counting at the server.

A site matches its detections to its true boxes, image by image and class by class, with pycocotools itself.
What it says of a detection is the class, the score in steps of 1/10000 and at which of the ten overlap
thresholds it found a true box; of a true box, the class. No box, no image and no overlap leaves the site.
Such outcomes add up, and precision and recall over any set of sites follow from their counts exactly as
`COCOeval.accumulate` computes them over all images in one place.

Equal scores: COCOeval takes detections of one score in the order of the images, which no server knows. Here
the false ones come first, so that the figure does not depend on an order and is the lowest that any order
gives. It differs from COCOeval's only where a right and a wrong detection of one class share
a score, to 1/10000.

Source: Lin et al. 2014, arXiv:1405.0312; pycocotools 2.0, `cocoeval.py`.
"""

from __future__ import annotations

from collections import defaultdict
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from quorate.shared.errors import ModelError, ProtocolError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

SCORE_STEPS = 10_000
"""A score of 1 in the steps that outcomes count in."""
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""Overlaps (intersection over union) from which a detection counts as right; bit i of a mask is the i-th."""
RECALLS = np.linspace(0.0, 1.0, 101)
"""Recalls at which precision is read."""
DETECTED, TRUE = 0, 1
"""The first figure of an outcome: what it speaks of."""
WIDTH = 4
"""(DETECTED, class, score, mask of thresholds at which it is right), or (TRUE, class, 0, 0)."""


def import_extra(module: str) -> Any:
    """Import what the extra `detection` installs.

    Raises: ModelError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ModelError(
            f"object detection needs {module.partition('.')[0]}, which is not installed; "
            "pip install 'quorate[detection]'.",
            kind="no-detection-extra",
        ) from error


def match(
    true_labels: Ints, true_boxes: Floats, labels: Ints, boxes: Floats, scores: Floats, classes: int
) -> Ints:
    """Match one image's detections to its true boxes; returns its outcomes, [detections + true boxes, WIDTH].

    Each class by itself, best score first, each detection to the free true box it overlaps most, at each
    threshold anew: `COCOeval.evaluateImg`, over boxes of every area.

    Args:
        true_labels: [m], class ids.
        true_boxes: [m, 4], x, y, width, height, in any one unit per axis: overlaps do not depend on it.
        labels, boxes, scores: the same of the detections, [n], [n, 4], [n] in 0..1.
        classes: how many there are.
    """
    coco = import_extra("pycocotools.cocoeval").COCOeval(iouType="bbox")
    # Not through COCO objects, whose indices print what they do and need every image in one place.
    coco.params.imgIds, coco.params.catIds = [0], list(range(classes))
    coco.params.maxDets = [max(len(labels), 1)]
    coco._gts, coco._dts = _by_class(true_labels, true_boxes), _by_class(labels, boxes, scores)
    outcomes = []
    bits = 1 << np.arange(len(IOU_THRESHOLDS))
    for label in np.unique(labels):
        coco.ious = {(0, label): coco.computeIoU(0, label)}
        found = coco.evaluateImg(0, label, (0, float("inf")), coco.params.maxDets[0])
        masks = bits @ (found["dtMatches"] > 0)
        steps = np.rint(np.array(found["dtScores"]) * SCORE_STEPS)
        outcomes += [(DETECTED, label, step, mask) for step, mask in zip(steps, masks, strict=True)]
    outcomes += [(TRUE, label, 0, 0) for label in true_labels]
    return np.array(outcomes, dtype=np.int64).reshape(-1, WIDTH)


def _by_class(labels: Ints, boxes: Floats, scores: Floats | None = None) -> dict[tuple[int, int], list[Any]]:
    """Return annotations as COCOeval keeps them: (image, class) -> list; ids from 1, as 0 says unmatched."""
    found: dict[tuple[int, int], list[Any]] = defaultdict(list)
    for index, (label, box) in enumerate(zip(labels, boxes, strict=True)):
        score = {} if scores is None else {"score": float(scores[index])}
        area = float(box[2] * box[3])
        found[0, int(label)].append(
            {"id": index + 1, "bbox": box.tolist(), "area": area, "iscrowd": 0, "ignore": 0, **score}
        )
    return found


def average_precision(values: Ints, counts: Ints, classes: int) -> tuple[Floats, Ints]:
    """Return the average precision of each class at each threshold, and the true boxes of each class.

    Args:
        values: distinct outcomes, [n, WIDTH].
        counts: how often each occurred, [n].
        classes: how many there are.
    Returns: [classes, thresholds], NaN for a class without true boxes; [classes].
    """
    precision = np.full((classes, len(IOU_THRESHOLDS)), np.nan)
    support = np.zeros(classes, dtype=np.int64)
    for label in range(classes):
        ours = values[:, 1] == label
        support[label] = counts[ours & (values[:, 0] == TRUE)].sum()
        if support[label]:
            found = ours & (values[:, 0] == DETECTED)
            precision[label] = _of_class(values[found, 2], values[found, 3], counts[found], support[label])
    return precision, support


def _of_class(scores: Ints, masks: Ints, counts: Ints, support: int) -> Floats:
    """Return one class's average precision per threshold, [thresholds].

    Precision is read where a score ends, which is what false ones first among equal scores comes to.
    """
    if not len(scores):
        return np.zeros(len(IOU_THRESHOLDS))
    distinct, place = np.unique(-scores, return_inverse=True)
    found = np.zeros(len(distinct))
    np.add.at(found, place, counts)
    found = found.cumsum()
    result = np.zeros(len(IOU_THRESHOLDS))
    for bit in range(len(IOU_THRESHOLDS)):
        right = np.zeros(len(distinct))
        np.add.at(right, place, counts * (masks >> bit & 1))
        right = right.cumsum()
        precision = np.maximum.accumulate((right / found)[::-1])[::-1]
        at = np.searchsorted(right / support, RECALLS, side="left")
        result[bit] = np.append(precision, 0.0)[at].mean()  # a recall that is never reached has precision 0
    return result


def check(values: Ints, counts: Ints, classes: int, most: int) -> None:
    """Raise ProtocolError unless these can be outcomes, with at most `most` detections.

    Args:
        values, counts: as in `average_precision`.
        classes: how many there are.
        most: detections that so many images can have.
    """
    if values.ndim != 2 or values.shape[1] != WIDTH:
        message = f"sent outcomes that are not {WIDTH} numbers, as this task has them."
        raise ProtocolError(message, kind="wrong-width")
    highest = np.array([TRUE, classes - 1, SCORE_STEPS, 2 ** len(IOU_THRESHOLDS) - 1])
    true = values[:, 0] == TRUE
    if (values < 0).any() or (values > highest).any() or values[true, 2:].any():
        message = "sent outcomes with figures that no detection and no true box has."
        raise ProtocolError(message, kind="impossible-figures")
    if counts[~true].sum() > most:
        message = "sent more detections than task.max_detections allows for that many images."
        raise ProtocolError(message, kind="too-many-detections")
    bits = np.arange(len(IOU_THRESHOLDS))[:, None]
    for label in range(classes):
        ours = values[:, 1] == label
        right = ((values[:, 3] >> bits & 1) * counts)[:, ours & ~true].sum(axis=1)
        if (right > counts[ours & true].sum()).any():
            message = "sent more detections that are right than there are true boxes."
            raise ProtocolError(message, kind="too-many-right")
