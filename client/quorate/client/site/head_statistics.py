"""A site's answer to `statistics`: sums over its rows, from which the head is solved before round 1.

docs/decisions/069-analytic-head.md says what they are, and what they give away.
"""

from __future__ import annotations

from collections.abc import Sequence

from quorate.client.site.loaded import Resident
from quorate.client.trainer.features import head_inputs
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.adapters.linear_head import LinearHead, find_head
from quorate.shared.errors import ConfigError, RequestRefused
from quorate.shared.metrics.head_sums import HeadSums
from quorate.shared.metrics.ridge import solve_best
from quorate.shared.tasks.task import Example


def check_head(resident: Resident, examples: Sequence[Example]) -> None:
    """Raise ModelError or ConfigError where a run asks for a solved head that its model cannot have.

    Args:
        resident: of the run.
        examples: some; two of them are tried.
    """
    if resident.run.solves_head:
        _sums(resident, examples[:2], find_head(resident.run, resident.model.initial.schema))


def head_statistics(
    resident: Resident, train: Sequence[Example], validation: Sequence[Example], fewest: int | None
) -> Adapter:
    """Return the sums that leave, in float64.

    Args:
        resident: of the run; the base must be untouched.
        train: training examples, weighed.
        validation: validation examples. Where there are too few of them, or the run's sites share no
            outcomes, their sums are those over no rows.
        fewest: rows that sums must be over to leave; None for as many as features and their constant.
    Raises: RequestRefused: there are fewer training rows. ModelError: as `head_inputs`.
    """
    head = find_head(resident.run, resident.model.initial.schema)
    least = head.features + 1 if fewest is None else fewest
    if len(train) < least:
        raise RequestRefused(
            f"policy.min_rows_for_statistics: sums over {len(train)} training rows, of {head.features} "
            f"features and a constant, would leave, and at least {least} rows are asked for"
            + (" (as many as features, as fewer give their span away)" if fewest is None else "")
            + "; set it lower in site.yaml if that may be, or have the coordinator choose "
            "adapter.head.init: random.",
            code="policy-statistics",
        )
    measured = validation if resident.run.evaluation.share_outcomes and len(validation) >= least else ()
    sums = _sums(resident, train, head)
    return Adapter({**sums.arrays("train"), **_sums(resident, measured, head).arrays("validation")})


def own_start(resident: Resident, train: Sequence[Example], validation: Sequence[Example]) -> Adapter:
    """Return the adapter that this site alone begins from: its start, with a head solved on its own rows."""
    run, initial = resident.run, resident.model.initial
    if not run.solves_head:
        return initial
    head = find_head(run, initial.schema)
    solution = solve_best(_sums(resident, train, head), _sums(resident, validation, head))
    return initial.updated(head.arrays(solution.head(run.task.logit_scale)))


def _sums(resident: Resident, examples: Sequence[Example], head: LinearHead) -> HeadSums:
    """Return the sums over examples, on the features of the frozen model with the adapter's seeded start."""
    run, initial = resident.run, resident.model.initial
    asked = run.task.least_squares(examples)
    if asked is None:
        raise ConfigError(f"adapter.head.init analytic: task {run.task.name} has no head of that kind.")
    targets, weights = asked
    sums = HeadSums.zeros(head.features, head.outputs)
    for rows, features in head_inputs(resident.stack, run, initial, examples, head):
        sums = sums + HeadSums.of(features, targets[rows], weights[rows])
    return sums
