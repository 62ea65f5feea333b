"""Sequence classification and regression: labels, or a number, for a text."""

from __future__ import annotations

from typing import ClassVar, Literal

from quorate.shared.tasks.classification import Classification
from quorate.shared.tasks.regression import Regression
from quorate.shared.tasks.text.text_task import TextTargetTask


class SequenceClassification(Classification, TextTargetTask):
    """Classify texts. Columns: `text`, and `label` (an id, or a list of ids for multi-label)."""

    peft_task_type: ClassVar[str | None] = "SEQ_CLS"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"

    name: Literal["sequence_classification"]
    """The task."""


class SequenceRegression(Regression, TextTargetTask):
    """Predict a number from a text. Columns: `text`, and `label` (a number)."""

    peft_task_type: ClassVar[str | None] = "SEQ_CLS"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"

    name: Literal["sequence_regression"]
    """The task."""
