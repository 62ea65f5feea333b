"""Average precision from outcomes against pycocotools on all images in one place."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pycocotools", reason="needs the extra `detection`")
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from quorate.shared.metrics.detection_metrics import (
    IOU_THRESHOLDS,
    RECALLS,
    SCORE_STEPS,
    average_precision,
    match,
)
from quorate.shared.metrics.outcomes import Outcomes

CLASSES = 4
Image = tuple[Any, Any, Any, Any, Any]
"""True labels and boxes; detected labels, boxes and scores."""


def draw_images(count: int, seed: int, *, steps: int = SCORE_STEPS, distinct: bool = True) -> list[Image]:
    """Images of which some lack boxes, some detections, and class 2 is never true; scores on the grid."""
    draw = np.random.default_rng(seed)
    # Every score is used once, so that no order among equals can matter.
    scores = draw.permutation(np.arange(1, steps)) if distinct else None
    images, used = [], 0
    for _ in range(count):
        truths, extra = int(draw.integers(0, 7)), int(draw.integers(0, 6))
        labels = draw.choice([0, 1, 3], truths)
        boxes = np.column_stack([draw.uniform(0, 200, (truths, 2)), draw.uniform(10, 80, (truths, 2))])
        near = draw.permutation(np.repeat(np.arange(truths), 2))[: int(draw.integers(0, 2 * truths + 1))]
        guessed = boxes[near] + draw.normal(0, 4, (len(near), 4))
        guessed[:, 2:] = guessed[:, 2:].clip(1)
        false = np.column_stack([draw.uniform(0, 200, (extra, 2)), draw.uniform(10, 80, (extra, 2))])
        classes = np.concatenate([labels[near], draw.integers(0, CLASSES, extra)])
        classes = np.where(draw.random(len(classes)) < 0.1, draw.integers(0, CLASSES, len(classes)), classes)
        total = len(classes)
        if scores is not None:
            own = scores[used : used + total]
            used += total
        else:
            own = draw.integers(1, steps, total)
        found = np.concatenate([guessed, false])
        images.append((labels, boxes, classes.astype(int), found, own / steps))
    assert scores is None or used <= len(scores)
    return images


def coco_of(images: list[Image]) -> COCOeval:
    """pycocotools as everyone uses it: one data set, one file of results."""
    truth, results = COCO(), []
    truth.dataset = {
        "images": [{"id": i} for i in range(len(images))],
        "categories": [{"id": c} for c in range(CLASSES)],
        "annotations": [],
    }
    for i, (labels, boxes, classes, found, scores) in enumerate(images):
        for label, box in zip(labels, boxes, strict=True):
            truth.dataset["annotations"].append(
                {
                    "id": len(truth.dataset["annotations"]) + 1,
                    "image_id": i,
                    "category_id": int(label),
                    "bbox": box.tolist(),
                    "area": float(box[2] * box[3]),
                    "iscrowd": 0,
                }
            )
        for label, box, score in zip(classes, found, scores, strict=True):
            results.append(
                {"image_id": i, "category_id": int(label), "bbox": box.tolist(), "score": float(score)}
            )
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        coco = COCOeval(truth, truth.loadRes(results), "bbox")
        coco.evaluate()
        coco.accumulate()
        coco.summarize()
    return coco


def outcomes_of(images: list[Image]) -> Outcomes:
    rows = [match(*image, CLASSES) for image in images]
    return Outcomes.of_rows(np.concatenate(rows), 0.0, len(images))


def pooled(images: list[Image], sites: int) -> Outcomes:
    return Outcomes.pooled(outcomes_of(images[site::sites]) for site in range(sites))


@pytest.mark.parametrize("seed", range(3))
def test_pooled_over_sites_it_is_pycocotools_on_all_images(seed: int) -> None:
    images = draw_images(120, seed)
    coco = coco_of(images)
    precision, support = average_precision(*pooled(images, 5).arrays(), CLASSES)
    theirs = coco.eval["precision"][:, :, :, 0, -1]  # [thresholds, recalls, classes]
    assert (theirs[:, :, 2] == -1).all() and np.isnan(precision[2]).all(), "class 2 is never true"
    for label in (0, 1, 3):
        np.testing.assert_allclose(precision[label], theirs[:, :, label].mean(axis=1), atol=1e-9)
    figures = [np.nanmean(precision), np.nanmean(precision[:, 0]), np.nanmean(precision[:, 5])]
    assert figures == pytest.approx(coco.stats[:3].tolist(), abs=1e-9)
    assert 0.05 < figures[0] < figures[1] < 0.95, "a case where everything is right or wrong proves nothing"
    assert support.tolist() == [sum(int((image[0] == c).sum()) for image in images) for c in range(CLASSES)]
    assert IOU_THRESHOLDS.tolist() == coco.params.iouThrs.tolist()
    assert RECALLS.tolist() == coco.params.recThrs.tolist()


def test_how_images_are_shared_out_changes_nothing() -> None:
    images = draw_images(40, 7)
    assert pooled(images, 1) == pooled(images, 4) == pooled(images[::-1], 3)


def test_equal_scores_count_as_if_the_false_ones_came_first() -> None:
    """At each threshold, and whatever the order of images: the lowest figure pycocotools can give."""
    images = draw_images(80, 3, steps=12, distinct=False)
    precision, _ = average_precision(*pooled(images, 3).arrays(), CLASSES)
    for bit in (0, 5):
        lowest, highest = (_break_ties(images, bit, sign) for sign in (-1, 1))
        np.testing.assert_allclose(precision[[0, 1, 3], bit], lowest, atol=1e-9)
        any_order = _ap(coco_of(images), bit)
        assert (lowest <= any_order + 1e-9).all() and (any_order <= highest + 1e-9).all()
        assert (highest > lowest + 1e-3).any(), "ties must matter here"


def _ap(coco: COCOeval, bit: int) -> Any:
    return coco.eval["precision"][bit][:, [0, 1, 3], 0, -1].mean(axis=0)


def _break_ties(images: list[Image], bit: int, sign: int) -> Any:
    """Move the scores of the detections that are right at one threshold by less than a step.

    Matching is left as it was: accumulating alone sees the new scores.
    """
    coco = coco_of(images)
    for found in filter(None, coco.evalImgs):
        right = found["dtMatches"][bit] > 0
        found["dtScores"] = [s + sign * 1e-4 * r for s, r in zip(found["dtScores"], right, strict=True)]
    with contextlib.redirect_stdout(io.StringIO()):
        coco.accumulate()
    return _ap(coco, bit)


def test_an_image_without_boxes_or_detections() -> None:
    none, empty = np.zeros(0, dtype=int), np.zeros((0, 4))
    box = np.array([[10.0, 10.0, 20.0, 20.0]])
    assert match(none, empty, none, empty, np.zeros(0), CLASSES).shape == (0, 4)
    assert match(none, empty, np.array([1]), box, np.array([0.5]), CLASSES).tolist() == [[0, 1, 5000, 0]]
    assert match(np.array([1]), box, none, empty, np.zeros(0), CLASSES).tolist() == [[1, 1, 0, 0]]
    both = match(np.array([1]), box, np.array([1]), box, np.array([0.5]), CLASSES)
    assert both.tolist() == [[0, 1, 5000, 1023], [1, 1, 0, 0]]


def test_overlap_does_not_depend_on_the_unit_of_an_axis() -> None:
    scale = np.array([1 / 320, 1 / 240, 1 / 320, 1 / 240])
    for labels, boxes, classes, found, scores in draw_images(20, 5):
        pixels = match(labels, boxes, classes, found, scores, CLASSES)
        assert (match(labels, boxes * scale, classes, found * scale, scores, CLASSES) == pixels).all()
