"""A site's answer to `statistics`: sums over its rows, from which the head is solved before round 1.

docs/decisions/069-analytic-head.md says what they are, and what they give away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from quorate.client.site.loaded import Resident
from quorate.client.trainer.features import head_inputs
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.adapters.linear_head import LinearHead, find_head
from quorate.shared.errors import ConfigError, RequestRefused
from quorate.shared.metrics.head_sums import Doubles, HeadSums
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
        train: training examples, weighed. What hardly weighs beside other rows hides nothing of them: rows
            count as those of one weight would that vary as much (Kish's effective sample size).
        validation: validation examples. Where there are too few of them, or the run's sites share no
            outcomes, their sums are those over no rows.
        fewest: rows that sums must be over to leave; None for as many as features and their constant.
    Raises: RequestRefused: there are fewer training rows, as they count, or the run draws which they are.
        ModelError: as `head_inputs`.
    """
    head = find_head(resident.run, resident.model.initial.schema)
    least = head.features + 1 if fewest is None else fewest
    if resident.run.training.examples_per_class is not None and least > 1:
        raise RequestRefused(
            "policy.min_rows_for_statistics: the run draws some of the training rows (training."
            "examples_per_class), and the sums of two such runs may differ by a single row; set it to 1 in "
            "site.yaml if that may be, or have the coordinator choose adapter.head.init: random.",
            code="policy-statistics",
        )
    count = _effective_rows(resident.run.task.least_squares(train))
    if count < least:
        by_weight = f", which by their weights count as {count}," if count < len(train) else ""
        raise RequestRefused(
            f"policy.min_rows_for_statistics: sums over {len(train)} training rows{by_weight or ','} of "
            f"{head.features} features and a constant, would leave, and at least {least} rows are asked for"
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


def _effective_rows(asked: tuple[Doubles, Doubles] | None) -> int:
    """Return (sum of weights)^2 / sum of their squares, rounded up; all rows where none weighs anything."""
    if asked is None:
        return 0
    _, weights = asked
    if not weights.any():
        return len(weights)  # sums of zeros say nothing
    relative = weights / weights.max()
    return math.ceil(float(relative.sum()) ** 2 / float((relative**2).sum()) - 1e-6)


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
