"""Step 4 of a round: what an update must be before it may touch the model. Raising sets it aside."""

from __future__ import annotations

import math
from collections.abc import Mapping

from quorate.shared.errors import AdapterError, ConfigError, NonFiniteUpdate, ProtocolError
from quorate.shared.messages import RoundRequest, Update
from quorate.shared.tasks import Task


class UpdateTooLarge(AdapterError):
    """An update that moved further than the run allows."""

    code = "norm"


def check_belongs(request: RoundRequest, update: Update) -> None:
    """Raise ProtocolError or ConfigError unless `update` answers exactly `request`."""
    asked, got = request.header, update.header
    for name in ("run_id", "round", "phase"):
        if getattr(asked, name) != getattr(got, name):
            raise ProtocolError(
                f"answered {name} {getattr(got, name)!r}; asked was {getattr(asked, name)!r}."
            )
    if asked.site and asked.site != got.site:
        raise ProtocolError(f"answered for site {got.site!r}; asked was {asked.site!r}.")
    if got.config_hash != asked.config_hash:
        raise ConfigError("worked under another run configuration than the one it was sent.")
    if got.input_hash != request.arrays.content_hash:
        raise ProtocolError("started from other arrays than it was sent.")


def check_measured(task: Task, update: Update) -> None:
    """Raise ProtocolError unless `update` says what the task's evaluation of that many rows can say."""
    outcomes = update.header.outcomes
    if outcomes is None:
        raise ProtocolError("sent an evaluation without outcomes.")
    if outcomes.rows != update.header.num_examples:
        raise ProtocolError("sent outcomes of another number of rows than it names.")
    task.check_outcomes(outcomes)


def check_trained(
    update: Update,
    schema: Mapping[str, tuple[int, ...]],
    norm: float,
    max_norm: float | None,
    weighting: str = "examples",
) -> None:
    """Raise AdapterError unless `update` holds the arrays asked for, finite, counted and near enough.

    Args:
        schema: name -> shape of the arrays that were asked for.
        norm: L2 distance the update moved [parameter units].
        max_norm: the run's bound on it.
        weighting: what the run weighs sites by.
    """
    update.arrays.check_schema(schema)
    update.arrays.check_finite()
    if update.header.num_examples < 1:
        raise ProtocolError("sent an update trained on no rows.")
    if weighting == "tokens" and update.header.num_tokens < 1:
        raise ProtocolError("sent an update without the number of tokens that it is weighed by.")
    if not all(math.isfinite(value) for value in update.header.metrics.values()):
        raise NonFiniteUpdate("reports a training figure that is NaN or infinite.")
    if max_norm is not None and norm > max_norm:
        raise UpdateTooLarge(
            f"moved {norm:.4g} from where it started; federation.max_update_norm allows {max_norm:.4g}."
        )
