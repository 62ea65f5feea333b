"""What classification tasks have in common: one label of several, or several labels at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import AfterValidator, Field, StringConstraints, model_validator
from torch import Tensor
from torch.nn import functional

from quorate.shared.config.config_model import LIST, ONE, ONE_OR_LIST
from quorate.shared.errors import DataError, ProtocolError
from quorate.shared.metrics.intervals import MeanOfRatios
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.tasks.task import Batch, Example, Kind, Metrics, Row, TargetTask


def _differ(labels: tuple[str, ...]) -> tuple[str, ...]:
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"label {twice[0]!r} is listed twice")
    return labels


def label_kwargs(labels: Sequence[str]) -> dict[str, Any]:
    """Return what `from_pretrained` takes to make a head for these labels."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }


DIFFER = AfterValidator(_differ)
"""Of a field with labels: none is listed twice."""
Label = Annotated[str, StringConstraints(min_length=1, max_length=200, strip_whitespace=True)]
Weight = Annotated[float, Field(ge=0)]


class Classification(TargetTask):
    """A task that classifies rows. Column: `label` (an id, or a list of ids for multi-label)."""

    default_metric: ClassVar[str] = "macro_f1"
    label_kind: ClassVar[Kind] = "label"
    labels_each_row: ClassVar[bool] = True
    logit_scale: ClassVar[float | None] = 8.0  # docs/decisions/069
    largest_target: ClassVar[float | None] = 1.0

    labels: Annotated[tuple[Label, ...], Field(min_length=2), DIFFER]
    """Label names, in the order of their ids."""
    problem_type: Literal["single_label_classification", "multi_label_classification"] = (
        "single_label_classification"
    )
    """One label per row, or any number of them."""
    class_weights: Annotated[
        Annotated[Literal["none", "balanced"], ONE] | Annotated[tuple[Weight, ...], LIST], ONE_OR_LIST
    ] = "none"
    """Loss weight per label: none; balanced, from the site's own label counts; or a list in label order.
    For several labels at once, the weight of a label's presence against its absence."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of a target that is spread evenly over all labels, in training alone."""
    focal_gamma: float = Field(0.0, ge=0)
    """Focal loss (arXiv:1708.02002) in training: (1 - p)**gamma times the cross-entropy of a label's p; 0 is
    plain cross-entropy."""

    @model_validator(mode="after")
    def _one_weight_per_label(self) -> Self:
        if isinstance(self.class_weights, tuple) and len(self.class_weights) != len(self.labels):
            raise ValueError(
                f"class_weights has {len(self.class_weights)} weights for {len(self.labels)} labels; "
                "give one weight per label"
            )
        return self

    @property
    def multi_label(self) -> bool:
        """Whether a text may carry several labels."""
        return self.problem_type == "multi_label_classification"

    @property
    def metrics_for_best_model(self) -> tuple[str, ...]:
        return ("exact_match", "micro_f1", "macro_f1") if self.multi_label else ("accuracy", "macro_f1")

    @property
    def mixes_rows(self) -> str | None:
        """Name weights from the site's counts."""
        if self.class_weights == "balanced":
            return (
                "task.class_weights balanced weighs a row by the counts of the site's other rows; "
                "list weights known beforehand, or use none"
            )
        return None

    def model_kwargs(self) -> dict[str, Any]:
        return {**label_kwargs(self.labels), "problem_type": self.problem_type}

    @property
    def blank_target(self) -> int | tuple[float, ...]:
        return (0.0,) * len(self.labels) if self.multi_label else 0

    def target(self, row: Row) -> int | tuple[float, ...]:
        """Return a row's label id, or a 0 or 1 per label.

        Raises: DataError: naming the row.
        """
        label = row.values.get("label")
        listed = isinstance(label, (list, tuple))
        ids: Sequence[Any] = label if isinstance(label, (list, tuple)) else [label]
        if self.multi_label != listed:
            found, wanted, other = "one label", "a list of labels", "single"
            if listed:
                found, wanted, other = wanted, found, "multi"
            raise DataError(
                f"{row.source}: label holds {found} where this task takes {wanted}; write {wanted} in each "
                f"row, or set task.problem_type: {other}_label_classification."
            )
        if not all(isinstance(index, int) and 0 <= index < len(self.labels) for index in ids):
            raise DataError(
                f"{row.source}: label {label!r} is not an id in 0..{len(self.labels) - 1}; "
                "check the label column and the labels mapping."
            )
        if isinstance(label, int):
            return label
        return tuple(float(index in ids) for index in range(len(self.labels)))

    def weigh(self, examples: Sequence[Example]) -> list[Example]:
        """Give each example its loss weight: a number, or one per label for several labels at once."""
        if self.class_weights == "none" or not examples:
            return list(examples)
        counts = np.array(list(self.label_counts(examples).values()), dtype=np.float64)
        if isinstance(self.class_weights, tuple):
            weights = np.array(self.class_weights)
        elif self.multi_label:
            weights = (len(examples) - counts) / np.maximum(counts, 1)
        else:
            # Labels this site lacks do not share in the mean weight of 1 that the others keep.
            weights = len(examples) / (np.count_nonzero(counts) * np.maximum(counts, 1))
        return [Example(e.features, e.target, self._weight_of(e, weights)) for e in examples]

    def _weight_of(self, example: Example, weights: npt.NDArray[np.float64]) -> float | tuple[float, ...]:
        if isinstance(example.target, int):
            return float(weights[example.target])
        return tuple(float(w) if t else 1.0 for w, t in zip(weights, example.target, strict=True))

    def least_squares(
        self, examples: Sequence[Example]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return 1 for a row's label and 0 for the others; of several labels at once, 1 if present, else -1.

        The answer is then the sign of an output. Of its labels' weights a row has the mean.
        """
        targets = np.zeros((len(examples), len(self.labels)))
        for row, example in zip(targets, examples, strict=True):
            if isinstance(example.target, int):
                row[example.target] = 1.0
            else:
                row[:] = 2 * np.array(example.target) - 1
        weights = np.array([np.mean(example.weight) for example in examples], dtype=np.float64)
        return targets, weights

    @property
    def mean_weights(self) -> tuple[float, float]:
        """Return those of the list; balanced weights have a mean of 1, for several labels one below 2."""
        if isinstance(self.class_weights, tuple):
            given = (*self.class_weights, 1.0) if self.multi_label else self.class_weights
            return min(given), max(given)
        return (0.0, 2.0) if self.multi_label and self.class_weights == "balanced" else (1.0, 1.0)

    def label_counts(self, examples: Sequence[Example]) -> dict[str, int]:
        counts = np.zeros(len(self.labels), dtype=np.int64)
        for example in examples:
            if isinstance(example.target, int):
                counts[example.target] += 1
            else:
                counts += np.array(example.target, dtype=np.int64)
        return dict(zip(self.labels, counts.tolist(), strict=True))

    def labels_of(self, example: Example) -> tuple[int, ...]:
        if isinstance(example.target, int):
            return (example.target,)
        return tuple(index for index, present in enumerate(example.target) if present)

    def loss(self, logits: Any, batch: Batch) -> Tensor:
        """Return weighted cross-entropy, or the mean over labels of weighted binary cross-entropy, [rows]."""
        return self._loss(logits, batch, self.label_smoothing, self.focal_gamma)

    def measured_loss(self, logits: Any, batch: Batch) -> Tensor:
        """Return the plain cross-entropy, whatever is done for training."""
        return self._loss(logits, batch, 0.0, 0.0)

    def _loss(self, logits: Any, batch: Batch, smoothing: float, gamma: float) -> Tensor:
        logits = logits.float()
        if not self.multi_label:
            each = functional.cross_entropy(
                logits, batch.targets, reduction="none", label_smoothing=smoothing
            )
            if gamma:
                right = logits.softmax(dim=1).gather(1, batch.targets[:, None])[:, 0]
                each = (1 - right) ** gamma * each
            return each * batch.weights
        targets = batch.targets * (1 - smoothing) + smoothing / 2
        each = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        if gamma:
            positive = logits.sigmoid()
            each = (batch.targets * (1 - positive) + (1 - batch.targets) * positive) ** gamma * each
        weights = batch.weights if batch.weights.ndim == 2 else batch.weights[:, None]
        return (each * weights).mean(dim=1)

    def outcomes(self, logits: Any, batch: Batch) -> npt.NDArray[np.int64]:
        """Return (true, predicted) per row; for several labels the true bits, then the predicted bits."""
        if not self.multi_label:
            pairs = torch.stack([batch.targets, logits.argmax(dim=-1)], dim=1)
        else:
            pairs = torch.cat([batch.targets > 0.5, logits > 0], dim=1)
        return pairs.cpu().numpy().astype(np.int64)

    def check_outcomes(self, outcomes: Outcomes) -> None:
        """Raise ProtocolError unless outcomes are pairs of label ids, or true and predicted bits."""
        if outcomes.units != outcomes.rows:
            raise ProtocolError("sent outcomes that are not one per row, as this task has them.")
        width, below = (2 * len(self.labels), 2) if self.multi_label else (2, len(self.labels))
        for value in outcomes.values:
            if len(value) != width or not all(0 <= each < below for each in value):
                raise ProtocolError(
                    f"sent outcomes that are not {width} numbers in 0..{below - 1}, as this task has them.",
                    kind="not-labels",
                )

    def metrics(self, outcomes: Outcomes) -> Metrics:
        """Return accuracy or exact_match and micro_f1, macro_f1, loss, per_class and the confusion matrix.

        Macro-F1 averages over the labels that occur in the truth, so that a site without a class is not
        punished for it: with one label a row, a wrong answer already counts against the class it missed. With
        several, nothing else would count it, and a label that was only guessed enters as well.
        """
        if not outcomes.rows:
            return {}
        values, counts = outcomes.arrays()
        classes = len(self.labels)
        result: Metrics = {}
        if self.multi_label:
            truth, guess = values[:, :classes].astype(bool), values[:, classes:].astype(bool)
            hit = counts @ (truth & guess)
            true, guessed = counts @ truth, counts @ guess
            result["exact_match"] = float(counts[(truth == guess).all(axis=1)].sum() / counts.sum())
            result["micro_f1"] = float(_f1(hit.sum(), true.sum(), guessed.sum()))
        else:
            confusion = np.zeros((classes, classes), dtype=np.int64)
            np.add.at(confusion, (values[:, 0], values[:, 1]), counts)
            hit, true, guessed = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
            result["accuracy"] = float(hit.sum() / counts.sum())
            result["confusion"] = confusion.tolist()
        f1 = _f1(hit, true, guessed)
        present = (true + guessed if self.multi_label else true) > 0
        result["macro_f1"] = float(f1[present].mean()) if present.any() else 0.0
        result["loss"] = outcomes.loss_sum / outcomes.rows
        result["per_class"] = {
            label: {
                "precision": float(hit[i] / max(guessed[i], 1)),
                "recall": float(hit[i] / max(true[i], 1)),
                "f1": float(f1[i]),
                "support": int(true[i]),
            }
            for i, label in enumerate(self.labels)
        }
        return result

    def ratios(self, outcomes: Outcomes) -> dict[str, MeanOfRatios]:
        """Return accuracy, or exact_match and micro_f1, and macro_f1."""
        if not outcomes.rows:
            return {}
        values, counts = outcomes.arrays()
        each, one = np.arange(len(self.labels)), np.ones((1, len(values)))
        if self.multi_label:
            truth, guess = (part.astype(bool).T for part in np.split(values, 2, axis=1))
            exact = (truth == guess).all(axis=0)
        else:
            truth, guess = values[:, 0] == each[:, None], values[:, 1] == each[:, None]
            exact = values[:, 0] == values[:, 1]
        right, both = 2.0 * (truth & guess), truth.astype(np.float64) + guess
        # A class that is only guessed enters macro_f1 where `metrics` lets it in.
        enters = (both if self.multi_label else truth) @ counts > 0
        found = {"macro_f1": MeanOfRatios(right[enters], both[enters])} if enters.any() else {}
        if self.multi_label:
            found["micro_f1"] = MeanOfRatios(right.sum(axis=0)[None], both.sum(axis=0)[None])
        return {
            "exact_match" if self.multi_label else "accuracy": MeanOfRatios(exact[None] * one, one),
            **found,
        }

    def predictions(self, logits: Any, batch: Batch, processor: Any) -> list[dict[str, Any]]:
        """Return each row's label (or labels) and the probability of every label."""
        logits = logits.float()
        probabilities = logits.sigmoid() if self.multi_label else logits.softmax(dim=-1)
        shown: list[dict[str, Any]] = []
        for row in probabilities.tolist():
            scores: dict[str, float] = dict(zip(self.labels, row, strict=True))
            if self.multi_label:
                shown.append({"labels": [k for k, p in scores.items() if p > 0.5], "scores": scores})
            else:
                shown.append({"label": self.labels[int(np.argmax(row))], "scores": scores})
        return shown


def _f1(hit: Any, true: Any, guessed: Any) -> npt.NDArray[np.float64]:
    """F1 = 2 hit / (true + guessed), 0 where a label occurs in neither."""
    return np.asarray(2 * hit / np.maximum(true + guessed, 1), dtype=np.float64)
