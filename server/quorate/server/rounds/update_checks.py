"""Step 4 of a round: what an update must be before it may touch the model. Raising sets it aside."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from quorate.shared.adapters.adapter import Adapter
from quorate.shared.adapters.linear_head import LinearHead
from quorate.shared.aggregation import Aggregator
from quorate.shared.errors import AdapterError, ConfigError, NonFiniteUpdate, ProtocolError
from quorate.shared.metrics.head_sums import HeadSums, sums_schema
from quorate.shared.protocol.messages import RoundRequest, Split, Update
from quorate.shared.tasks import Task

_LARGEST = 1e100
"""No figure of a working site is beyond this; sums over sites stay finite, and charts can be drawn."""
MOST_ROWS = 10**9
"""Nor holds a site more rows in a split: training on them once would take days."""
_MOST = 2**53
"""Nor any count; sums over a thousand sites fit an int64."""


class UpdateTooLarge(AdapterError):
    """An update that moved further than the run allows."""

    code = "norm"


class RowsChanged(ProtocolError):
    """An answer for other rows than the site joined with; that says nothing of the model."""

    code = "rows"


def check_belongs(request: RoundRequest, update: Update) -> None:
    """Raise ProtocolError or ConfigError unless `update` answers exactly `request`."""
    asked, got = request.header, update.header
    for name in ("run_id", "round", "phase"):
        if getattr(asked, name) != getattr(got, name):
            message = f"answered {name} {getattr(got, name)!r}; asked was {getattr(asked, name)!r}."
            raise ProtocolError(message)
    if asked.site and asked.site != got.site:
        raise ProtocolError(f"answered for site {got.site!r}; asked was {asked.site!r}.")
    if got.config_hash != asked.config_hash:
        raise ConfigError("worked under another run configuration than the one it was sent.")
    if got.input_hash != request.arrays.content_hash:
        raise ProtocolError("started from other arrays than it was sent.")


def check_measured(task: Task, update: Update, rows: int) -> None:
    """Raise ProtocolError unless `update` says what the task's evaluation of the site's `rows` can say."""
    outcomes = update.header.outcomes
    if outcomes is None:
        raise ProtocolError("sent an evaluation without outcomes.")
    if outcomes.rows != update.header.num_examples:
        raise RowsChanged("sent outcomes of another number of rows than it names.")
    _check_rows(update, rows)
    if any(abs(figure) > _LARGEST for figure in (outcomes.loss_sum, *outcomes.sums.values())):
        raise ProtocolError("sent a loss or a sum that no evaluation gives.")
    if outcomes.units > _MOST or any(abs(each) > _MOST for value in outcomes.values for each in value):
        raise ProtocolError("sent counts that no evaluation gives.")
    measured = max(outcomes.rows, outcomes.units)
    # Rounding may take a loss that is 0 a hair below it.
    if not -1e-6 * measured <= outcomes.loss_sum <= task.largest_loss * measured:
        raise ProtocolError("sent a loss that this task does not have.")
    task.check_outcomes(outcomes)


def check_trained(
    update: Update,
    schema: Mapping[str, tuple[int, ...]],
    start: Adapter,
    rows: int,
    max_norm: float | None,
    rule: Aggregator,
) -> float:
    """Return how far `update` moved from `start`, as an L2 norm [parameter units].

    Args:
        schema: name -> shape of the arrays that were asked for.
        start: the adapter the site was sent, with at least these arrays.
        rows: the training rows that the site joined with.
        max_norm: the run's bound on the norm.
        rule: the run's; says what sites are weighed by, and the dtype of the exchange.
    Raises: AdapterError, ProtocolError: it does not hold the arrays asked for, finite, counted, near enough.
    """
    update.arrays.check_schema(schema, rule.dtype(update.header.phase))
    update.arrays.check_finite()
    if update.header.num_examples < 1:
        raise ProtocolError("sent an update trained on no rows.")
    _check_rows(update, rows)
    if rule.weighting == "tokens" and update.header.num_tokens < 1:
        message = "sent an update without the number of tokens that it is weighed by."
        raise ProtocolError(message, kind="no-tokens")
    if not all(abs(value) <= _LARGEST for value in update.header.metrics.values()):
        raise NonFiniteUpdate("reports a training figure that is NaN, infinite or near to that.")
    with np.errstate(over="ignore"):
        norm = update.arrays.minus(start).l2_norm
    if not math.isfinite(norm):
        raise NonFiniteUpdate("moved further than float32 can hold.", kind="too-far")
    if max_norm is not None and norm > max_norm:
        message = f"moved {norm:.4g} from where it started; federation.max_update_norm allows {max_norm:.4g}."
        raise UpdateTooLarge(message)
    return norm


def check_statistics(task: Task, head: LinearHead, update: Update, rows: Mapping[Split, int]) -> None:
    """Raise AdapterError or ProtocolError unless `update` holds sums that a site's rows can have.

    Args:
        task: says what rows may weigh.
        head: that is to be solved.
        update: the answer to `statistics`.
        rows: of each split, as the site joined with them.
    """
    update.arrays.check_schema(sums_schema(head.features, head.outputs), "float64")
    update.arrays.check_finite()
    count, measured = rows.get("train", 0), rows.get("validation", 0)
    _check_rows(update, count)
    lightest, heaviest = task.mean_weights
    train = HeadSums.read(update.arrays, "train")
    train.check(count * lightest, count * heaviest)
    validation = HeadSums.read(update.arrays, "validation")
    # A site sends those over no rows where too few may leave.
    measured = measured if validation.gram.any() or validation.cross.any() or validation.squares.any() else 0
    validation.check(measured, measured)
    largest = task.largest_target
    if largest is not None and any(
        (each.squares > largest**2 * each.weight * (1 + 1e-9)).any() for each in (train, validation)
    ):
        raise ProtocolError("sent sums over targets larger than this task has.", kind="sums-of-large-targets")


def _check_rows(update: Update, rows: int) -> None:
    """Rows are a site's weight and its part in pooled figures: whoever changes them changes both."""
    if update.header.num_examples != rows:
        message = f"answered for {update.header.num_examples} rows; the site joined with {rows} of them."
        raise RowsChanged(message)
