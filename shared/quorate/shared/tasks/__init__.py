"""The task registry: each task in one file; `TaskConfig` is their union as a run file sees it."""

from __future__ import annotations

from quorate.shared.tasks.base import Task
from quorate.shared.tasks.sequence_classification import SequenceClassification

TaskConfig = SequenceClassification
TASKS: tuple[type[Task], ...] = (SequenceClassification,)

__all__ = ["TASKS", "SequenceClassification", "Task", "TaskConfig"]
