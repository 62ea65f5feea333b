"""What regression tasks have in common: a number to predict, squared error, RMSE, MAE and R squared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from quorate.shared.errors import DataError, ProtocolError
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.tasks.task import Batch, Example, Kind, Metrics, Row, TargetTask

_SUMS = ("absolute", "squared", "target", "target_squared")


class Regression(TargetTask):
    """A task that predicts one number a row. Column: `label`."""

    default_metric: ClassVar[str] = "rmse"
    label_kind: ClassVar[Kind] = "number"
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"loss", "rmse", "mae"})
    largest_loss: ClassVar[float] = float(np.finfo(np.float32).max)  # targets need not be standardised

    target_mean: float = 0.0
    """Subtracted from targets before training; about their mean. The same at every site, so it is stated."""
    target_scale: float = Field(1.0, gt=0)
    """Targets are divided by this after that; about their standard deviation."""
    loss_function: Literal["mse", "huber"] = "mse"
    """Squared error, or Huber's loss (linear beyond an error of one target_scale)."""

    @property
    def metrics_for_best_model(self) -> tuple[str, ...]:
        return ("rmse", "mae", "r2")

    def model_kwargs(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def target(self, row: Row) -> float:
        """Return the row's number, standardised."""
        value = row.values.get("label")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise DataError(f"{row.source}: the label is not a finite number; correct it or remove the row.")
        return (float(value) - self.target_mean) / self.target_scale

    def least_squares(
        self, examples: Sequence[Example]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return the standardised numbers, each of weight 1, whatever the loss of the training."""
        targets = np.array([example.target for example in examples], dtype=np.float64)
        return targets[:, None], np.ones(len(examples))

    @property
    def blank_target(self) -> float:
        return 0.0

    def loss(self, logits: Any, batch: Batch) -> Tensor:
        """Return the weighted squared error (or Huber's loss) in standardised units, [rows]."""
        function = functional.mse_loss if self.loss_function == "mse" else functional.huber_loss
        return function(logits.float()[:, 0], batch.targets.float(), reduction="none") * batch.weights

    def outcomes(self, logits: Any, batch: Batch) -> npt.NDArray[np.int64]:
        return np.empty((0, 1), dtype=np.int64)

    def sums(self, logits: Any, batch: Batch) -> dict[str, float]:
        """Return sums of absolute and squared errors, of targets and their squares, in the data's units."""
        targets = batch.targets.double() * self.target_scale + self.target_mean
        errors = logits.double()[:, 0] * self.target_scale + self.target_mean - targets
        figures = (errors.abs(), errors.square(), targets, targets.square())
        return {name: float(figure.sum()) for name, figure in zip(_SUMS, figures, strict=True)}

    def check_outcomes(self, outcomes: Outcomes) -> None:
        """Raise ProtocolError unless there are the four sums alone."""
        if outcomes.values or (outcomes.rows and set(outcomes.sums) != set(_SUMS)):
            raise ProtocolError("sent outcomes that are not the sums of a regression.")
        if not all(map(math.isfinite, outcomes.sums.values())):
            raise ProtocolError("sent sums that are not finite.")
        sums, slack = outcomes.sums, 1 + 1e-6  # of rounding
        for total, squares in (("absolute", "squared"), ("target", "target_squared")) if sums else ():
            if sums[squares] < 0 or sums[total] ** 2 > slack * outcomes.rows * sums[squares]:
                raise ProtocolError(f"sent sums of numbers and of their squares that no {total} values have.")
        if sums and sums["absolute"] < 0:
            raise ProtocolError("sent a negative sum of absolute errors.")

    def metrics(self, outcomes: Outcomes) -> Metrics:
        """Return rmse, mae, r2 (against the mean of these rows' targets) and loss."""
        rows = outcomes.rows
        if not rows:
            return {}
        sums = outcomes.sums
        spread = sums["target_squared"] - sums["target"] ** 2 / rows
        known = spread > 1e-12 * sums["target_squared"]  # targets that are all the same have no spread
        return {
            "rmse": math.sqrt(max(sums["squared"], 0.0) / rows),
            "mae": sums["absolute"] / rows,
            "r2": 1 - sums["squared"] / spread if known else math.nan,
            "loss": outcomes.loss_sum / rows,
        }

    def predictions(self, logits: Any, batch: Batch, processor: Any) -> list[dict[str, Any]]:
        """Return each row's number in the data's units."""
        numbers = logits.double()[:, 0] * self.target_scale + self.target_mean
        return [{"value": number} for number in numbers.tolist()]
