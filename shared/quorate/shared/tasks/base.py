"""The interface of a task: from a site's rows to examples, loss and metrics.

A task is one file with one class, which is also the task's configuration in the run file. It knows nothing
of sites, rounds or adapters. Losses are per example: an average over a batch would let the rows of one site
(or, under differential privacy, of one patient) change the gradient of another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quorate.shared.config.base import ConfigModel
from quorate.shared.outcomes import Outcomes

Metrics = dict[str, Any]
"""Nested: names to float, or to further names; lists for a confusion matrix."""


@dataclass(frozen=True)
class Row:
    """One row of a site's data, with the task's own column names, and where it came from."""

    values: Mapping[str, Any]
    source: str
    """`file:line`, for messages that stay at the site."""


@dataclass(frozen=True)
class Example:
    """One row made ready: model inputs without padding, target and loss weight."""

    features: Mapping[str, Sequence[int]]
    target: Sequence[float] | int
    weight: Sequence[float] | float = 1.0


@dataclass
class Batch:
    """Examples padded to one length.

    Args:
        inputs: the model's keyword arguments, each [rows, ...].
        targets: [rows] or [rows, labels].
        weights: loss weights, [rows] or [rows, labels].
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`."""
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        return Batch(inputs, self.targets.to(device), self.weights.to(device))


class Task(ConfigModel, ABC):
    """One task with its options."""

    columns: ClassVar[tuple[str, ...]]
    """Columns every row must have."""
    default_metric: ClassVar[str]
    """Metric that picks the best round."""
    peft_task_type: ClassVar[str]
    """PEFT's TaskType, which decides what PEFT saves and how it wraps the head."""
    auto_class: ClassVar[str]
    """Name of the transformers Auto class that loads the base model with this task's head."""
    processor_class: ClassVar[str] = "AutoTokenizer"
    """Name of the transformers Auto class that loads what `encode` and `collate` take."""

    @property
    @abstractmethod
    def metrics_for_best_model(self) -> tuple[str, ...]:
        """Metrics that may pick the best round: scalars of `metrics` of which larger is better."""

    @abstractmethod
    def model_kwargs(self) -> dict[str, Any]:
        """Return keyword arguments for `from_pretrained` (number and names of labels, ...)."""

    @abstractmethod
    def encode(self, rows: Sequence[Row], processor: Any, *, labelled: bool = True) -> list[Example]:
        """Turn rows into examples; without labels, targets are zeros that nobody reads.

        Raises: DataError: naming the row's source, for a row the task cannot use.
        """

    @abstractmethod
    def weigh(self, examples: Sequence[Example]) -> list[Example]:
        """Return training examples with the loss weights the configuration asks for, from this site alone."""

    @abstractmethod
    def label_counts(self, examples: Sequence[Example]) -> dict[str, int]:
        """Return how many examples carry each label, zeros included."""

    @abstractmethod
    def length(self, example: Example) -> int:
        """Return the example's size before padding, to sort by."""

    @abstractmethod
    def collate(self, examples: Sequence[Example], processor: Any) -> Batch:
        """Pad examples to the longest of them."""

    @abstractmethod
    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the weighted loss of each example, [rows], in float32."""

    @abstractmethod
    def outcomes(self, logits: Tensor, batch: Batch) -> npt.NDArray[np.int64]:
        """Return the outcome of each example, [rows, width]; see `quorate.shared.outcomes`."""

    @abstractmethod
    def check_outcomes(self, outcomes: Outcomes) -> None:
        """Raise ProtocolError unless `outcomes`, which come from a site, can be outcomes of this task."""

    @abstractmethod
    def metrics(self, outcomes: Outcomes) -> Metrics:
        """Return every metric of these outcomes; scalars at the top level are those that are compared."""

    @abstractmethod
    def predictions(self, logits: Tensor) -> list[dict[str, Any]]:
        """Return what `quorate predict` shows for each row."""
