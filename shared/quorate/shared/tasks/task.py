"""The interface of a task: from a site's rows to examples, loss and metrics.

A task is one file with one class, which is also the task's configuration in the run file. It knows nothing
of sites, rounds or adapters. Losses are per example: an average over a batch would let the rows of one site
(or, under differential privacy, of one patient) change the gradient of another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from quorate.shared.config.config_model import ConfigModel
from quorate.shared.metrics.intervals import MeanOfRatios, UnitCounts
from quorate.shared.metrics.outcomes import Outcomes

Metrics = dict[str, Any]
"""Nested: names to float, or to further names; lists for a confusion matrix."""
Kind = Literal["text", "label", "number", "tokens", "tags", "messages", "image", "objects"]
"""What a column holds once the site has mapped it: a text that is not empty; a label's id, or a list of ids;
a finite number; a list of words; a list of label ids, one per word; a list of chat messages; an image file's
path or its bytes; a list of (label id, x, y, width, height)."""


@dataclass(frozen=True)
class Row:
    """One row of a site's data, with the task's own column names, and where it came from."""

    values: Mapping[str, Any]
    source: str
    """`file:line`, for messages that stay at the site."""
    group: str | None = field(default=None, kw_only=True)
    """Whose row it is, such as a patient's, where the site maps the column `group`; it stays at the site."""


@dataclass(frozen=True)
class Example:
    """One row made ready: model inputs without padding, target and loss weight.

    Args:
        features: name -> list of token figures, or an array.
        target: a label's id, a list of figures, or what else the task's loss compares with.
        weight: on the loss; a number, or one per label.
    """

    features: Mapping[str, Any]
    target: Any
    weight: Sequence[float] | float = 1.0


@dataclass
class Batch:
    """Examples padded to one length.

    Args:
        inputs: the model's keyword arguments, each [rows, ...].
        targets: [rows, ...]; a list with one entry per row where rows have targets of unlike shape; or a
            mapping of names to such.
        weights: loss weights, [rows], [rows, labels] or [rows, tokens].
    """

    inputs: dict[str, Any]
    targets: Any
    weights: Tensor

    def to(self, device: torch.device) -> Batch:
        return replace(
            self,
            inputs=_moved(self.inputs, device),
            targets=_moved(self.targets, device),
            weights=self.weights.to(device),
        )


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(each, device) for name, each in value.items()}
    return [_moved(each, device) for each in value] if isinstance(value, list) else value


class Task(ConfigModel, ABC):
    """One task with its options."""

    default_metric: ClassVar[str]
    """Metric that picks the best round."""
    counts_tokens: ClassVar[bool] = False
    """Whether `num_tokens` counts something."""
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"loss"})
    """Metrics of which a smaller value is the better one."""
    sequences: ClassVar[int] = 1
    """Sequences that `collate` makes of a row, one after the other: two for a pair to compare."""
    largest_loss: ClassVar[float] = 1e6
    """Largest loss of a row or token [nats] that a model gives which is of any use; no loss is negative."""
    counted: ClassVar[str] = "rows"
    """What `label_counts` counts, as the report calls it."""
    logit_scale: ClassVar[float | None] = None
    """What a head that was solved for `least_squares` is multiplied by to give logits; None where its outputs
    are what is predicted."""
    largest_target: ClassVar[float | None] = None
    """Size of the largest number that `least_squares` has for any row; None where rows say."""
    peft_task_type: ClassVar[str | None]
    """PEFT's TaskType, which decides what PEFT saves and how it wraps the head; None for models that PEFT has
    no type for, whose head is named by `head_modules`."""
    auto_class: ClassVar[str]
    """Name of the transformers Auto class that loads the base model with this task's head."""
    processor_class: ClassVar[str] = "AutoTokenizer"
    """Name of the transformers Auto class that loads what `encode` and `collate` take."""
    class_name: ClassVar[str] = "class"
    """What the report calls the entries of the metric `per_class`."""
    unit_name: ClassVar[str] = "rows"
    """What the report says their support is counted in."""

    labels_each_row: ClassVar[bool] = False
    """Whether a row has a label, or several, of its own, which `labels_of` returns."""

    @property
    def mixes_rows(self) -> str | None:
        """What of this configuration lets a training row's loss depend on other rows, and its remedy.

        Differential privacy at the sites refuses it: there a row may change its own gradient alone.
        """
        return None

    @property
    @abstractmethod
    def columns(self) -> Mapping[str, Kind]:
        """Columns every row must have, and what they hold."""

    @property
    @abstractmethod
    def metrics_for_best_model(self) -> tuple[str, ...]:
        """Metrics that may pick the best round: scalars of `metrics`."""

    def sign(self, metric: str) -> int:
        """Return 1 for a metric of which larger is better, else -1."""
        return -1 if metric in self.lower_is_better else 1

    @abstractmethod
    def model_kwargs(self) -> dict[str, Any]:
        """Return keyword arguments for `from_pretrained` (number and names of labels, ...)."""

    def kwargs_for(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return further keyword arguments for `from_pretrained` that the model's `config.json` calls for."""
        return {}

    def default_targets(self, base: nn.Module) -> tuple[str, ...] | str | None:
        """Return the layers that are adapted unless the run names some; None leaves it to PEFT."""
        return None

    def head_modules(self, base: nn.Module) -> tuple[str, ...] | None:
        """Return the modules that are trained whole unless the run names others; None leaves it to PEFT."""
        return None

    def prepare_processor(self, processor: Any, base: Any, pad_token: str | None, name: str) -> Any:
        """Return the processor as `encode` and `collate` need it; may complete `base.config`.

        Args:
            processor: as transformers loads it.
            base: the model.
            pad_token: the run's `model.pad_token`.
            name: the model's folder, for messages.
        Raises: ModelError: the model cannot do this task as configured.
        """
        return processor

    @abstractmethod
    def encode(self, rows: Sequence[Row], processor: Any, *, labelled: bool = True) -> list[Example]:
        """Turn rows into examples; without labels, targets are zeros that nobody reads.

        Raises: DataError: naming the row's source, for a row the task cannot use.
        """

    def notes(self, rows: Sequence[Row], examples: Sequence[Example]) -> tuple[str, ...]:
        """Return what a reader of the report should know of a site's training rows, in counts alone."""
        return ()

    def pack(self, examples: Sequence[Example]) -> list[Example]:
        """Return training examples with several joined in one where the configuration asks for that."""
        return list(examples)

    def num_rows(self, examples: Sequence[Example]) -> int:
        """Return how many of the site's rows these examples hold."""
        return len(examples)

    def num_tokens(self, examples: Sequence[Example]) -> int:
        """Return how many tokens' losses are trained in these examples; 0 for a task that trains rows.

        What `aggregation.weighting: tokens` weighs sites by, see `counts_tokens`.
        """
        return 0

    def weigh(self, examples: Sequence[Example]) -> list[Example]:
        """Return training examples with the loss weights the configuration asks for, from this site alone."""
        return list(examples)

    def least_squares(
        self, examples: Sequence[Example]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
        """Return what the head's outputs are to come near to, [rows, outputs], and each row's weight, [rows].

        None, whatever the examples, for a task whose head is not one linear layer with an output for each.
        """
        return None

    @property
    def mean_weights(self) -> tuple[float, float]:
        """Smallest and largest mean of the weights in `least_squares` that a site's rows can have."""
        return 1.0, 1.0

    def augment(
        self, examples: Sequence[Example], draw: np.random.Generator, processor: Any
    ) -> list[Example]:
        """Return the examples of one step with random changes, in training alone; `draw` is the site's."""
        return list(examples)

    def label_counts(self, examples: Sequence[Example]) -> dict[str, int]:
        """Return how many examples carry each label, zeros included; empty where there are no labels."""
        return {}

    def labels_of(self, example: Example) -> tuple[int, ...]:
        """Return the ids of an example's own labels; none unless `labels_each_row`."""
        return ()

    @abstractmethod
    def length(self, example: Example) -> int:
        """Return the example's size before padding, to sort by; 0 where all are of one size."""

    def longest(self, example: Example) -> Example | None:
        """Return an example of the largest size that this task makes, out of `example`'s own parts.

        None where all are of one size.
        """
        return None

    @abstractmethod
    def collate(self, examples: Sequence[Example], processor: Any, length: int | None = None) -> Batch:
        """Pad examples to `length`, or to the longest of them; where all are of one size neither matters."""

    def forward(self, model: Any, batch: Batch) -> Any:
        """Run the model; what it returns is the `logits` of the methods below."""
        return model(**batch.inputs).logits

    @abstractmethod
    def loss(self, logits: Any, batch: Batch) -> Tensor:
        """Return the weighted loss of each example, [rows], in float32."""

    def measured_loss(self, logits: Any, batch: Batch) -> Tensor:
        """Return what an evaluation sums up as its loss, [rows]: the training loss unless overridden."""
        return self.loss(logits, batch)

    @abstractmethod
    def outcomes(self, logits: Any, batch: Batch) -> npt.NDArray[np.int64]:
        """Return the batch's outcomes, [n, width], one per row, or per token, entity or box.

        See `quorate.shared.metrics.outcomes`.
        """

    def sums(self, logits: Any, batch: Batch) -> dict[str, float]:
        """Return further figures of the batch that add up over rows and sites, such as squared errors."""
        return {}

    @abstractmethod
    def check_outcomes(self, outcomes: Outcomes) -> None:
        """Raise ProtocolError unless `outcomes`, which come from a site, can be outcomes of this task."""

    @abstractmethod
    def metrics(self, outcomes: Outcomes) -> Metrics:
        """Return every metric of these outcomes; scalars at the top level are those that are compared."""

    def ratios(self, outcomes: Outcomes) -> dict[str, MeanOfRatios]:
        """Return the metrics that have intervals, as ratios of what `unit_counts` counts."""
        return {}

    def unit_counts(self, outcomes: Outcomes) -> UnitCounts:
        """Return what independent units count: here each row is a unit, with one outcome."""
        counts = np.array(outcomes.counts, dtype=np.float64)
        return UnitCounts(counts, counts)

    @property
    def prompts(self) -> tuple[str, ...]:
        """Public prompts of the run file that `samples` answers; none for most tasks."""
        return ()

    def samples(self, model: Any, processor: Any) -> list[tuple[str, str]]:
        """Return what the model says to texts of the run file itself, for the report: (text, answer)."""
        return []

    @abstractmethod
    def predictions(self, logits: Any, batch: Batch, processor: Any) -> list[dict[str, Any]]:
        """Return what `quorate predict` shows for each row."""


class TargetTask(Task):
    """A task with one target a row, such as a label or a number, in the column `label`."""

    label_kind: ClassVar[Kind]
    """What that column holds."""

    @abstractmethod
    def target(self, row: Row) -> Any:
        """Return what is to be learnt from a row.

        Raises: DataError: naming the row.
        """

    @property
    @abstractmethod
    def blank_target(self) -> Any:
        """The target of a row that is only predicted."""
