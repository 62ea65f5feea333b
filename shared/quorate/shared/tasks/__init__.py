"""The task registry: each task in one file; `TaskConfig` is their union as a run file sees it."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from quorate.shared.tasks.causal_lm import CausalLM
from quorate.shared.tasks.image_classification import ImageClassification, ImageRegression
from quorate.shared.tasks.object_detection import ObjectDetection
from quorate.shared.tasks.sequence_classification import SequenceClassification, SequenceRegression
from quorate.shared.tasks.task import Task
from quorate.shared.tasks.token_classification import TokenClassification

TaskConfig = Annotated[
    SequenceClassification
    | SequenceRegression
    | TokenClassification
    | ImageClassification
    | ImageRegression
    | ObjectDetection
    | CausalLM,
    Field(discriminator="name"),
]
TASKS: tuple[type[Task], ...] = get_args(get_args(TaskConfig)[0])
"""The members of the union."""

__all__ = [
    "TASKS",
    "CausalLM",
    "ImageClassification",
    "ImageRegression",
    "ObjectDetection",
    "SequenceClassification",
    "SequenceRegression",
    "Task",
    "TaskConfig",
    "TokenClassification",
]
