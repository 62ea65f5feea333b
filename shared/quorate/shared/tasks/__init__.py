"""The task registry: each task in one file; `TaskConfig` is their union as a run file sees it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from quorate.shared.tasks.base import Task
from quorate.shared.tasks.causal_lm import CausalLM
from quorate.shared.tasks.sequence_classification import SequenceClassification, SequenceRegression

TaskConfig = Annotated[
    SequenceClassification | SequenceRegression | CausalLM,
    Field(discriminator="name"),
]
TASKS: tuple[type[Task], ...] = (SequenceClassification, SequenceRegression, CausalLM)

__all__ = ["TASKS", "CausalLM", "SequenceClassification", "SequenceRegression", "Task", "TaskConfig"]
