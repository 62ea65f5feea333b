"""Image classification and regression: labels, or a number, for an image."""

from __future__ import annotations

from typing import ClassVar, Literal

from quorate.shared.tasks.classification import Classification
from quorate.shared.tasks.regression import Regression
from quorate.shared.tasks.vision.image_task import ImageTask


class ImageClassification(Classification, ImageTask):
    """Classify images. Columns: `image`, and `label` (an id, or a list of ids for multi-label)."""

    auto_class: ClassVar[str] = "AutoModelForImageClassification"

    name: Literal["image_classification"]
    """The task."""


class ImageRegression(Regression, ImageTask):
    """Predict a number from an image. Columns: `image`, and `label` (a number)."""

    auto_class: ClassVar[str] = "AutoModelForImageClassification"

    name: Literal["image_regression"]
    """The task."""
