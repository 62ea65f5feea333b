"""Can whoever holds the released adapter tell which rows it was trained on?

The attacker is a strong one: it knows every row, and trains reference adapters on the same base in the same
way, each on a random half of the rows in question, so that every row was seen by half of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quorate.client.audit.shadow_models import Losses, Shadow, released_losses
from quorate.shared.errors import DataError
from quorate.shared.privacy.audit.membership_inference import Attack, attack, rmia
from quorate.shared.progress import OnStep, ignore_step
from quorate.shared.seeds import rng
from quorate.shared.tasks.task import Row

FEWEST = 20
"""Fewer rows of a kind say nothing about a false-positive rate."""


@dataclass(frozen=True)
class Rows:
    """What an attack is about.

    Args:
        members: rows that the adapter was trained on.
        others: rows from the same source that nobody trained on.
        population: further such rows, which scores are measured against.
    """

    members: Sequence[Row]
    others: Sequence[Row]
    population: Sequence[Row]

    def check(self) -> None:
        """Raise DataError where there are too few rows for an attack to say anything."""
        for what, rows in (("train", self.members), ("test", self.others), ("validation", self.population)):
            if len(rows) < FEWEST:
                raise DataError(
                    f"an audit by membership needs {FEWEST} {what} rows or more and has {len(rows)}; give "
                    "the site more, or leave this attack out.",
                    kind="too-few-rows",
                )


def membership(
    shadow: Shadow, adapter_dir: Path, rows: Rows, *, pairs: int = 2, on_step: OnStep = ignore_step
) -> Attack:
    """Attack a released adapter by RMIA.

    Args:
        adapter_dir: what was released: the run's `adapter/`.
        rows: members and others; the reference adapters see random halves of both.
        pairs: twice as many reference adapters are trained.
    Raises: DataError: too few rows, or one that the task cannot use. AdapterError.
    """
    rows.check()
    asked = [*rows.members, *rows.others]
    seen = halves(len(asked), pairs, shadow.run.seed)
    sets = {f"(reference {i})": [asked[row] for row in np.flatnonzero(half)] for i, half in enumerate(seen)}
    references = shadow.train(sets, on_step)
    examples, population = shadow.encode(asked), shadow.encode(rows.population)
    released = released_losses(adapter_dir, shadow.run, [*examples, *population])
    blind = [(shadow.losses(each, examples), shadow.losses(each, population)) for each in references.values()]
    n = len(asked)
    scores = rmia(
        -released[:n],
        unseen(-np.stack([on_rows for on_rows, _ in blind]), seen),
        -released[n:],
        -np.stack([on_population for _, on_population in blind]),
    )
    return attack(scores[: len(rows.members)], scores[len(rows.members) :], seed=shadow.run.seed)


def halves(rows: int, pairs: int, seed: int) -> NDArray[np.bool_]:
    """Return which rows each reference adapter sees, [2 pairs, rows]: a random half, then the other half."""
    seen = np.zeros((2 * pairs, rows), dtype=bool)
    for pair in range(pairs):
        seen[2 * pair, rng(seed, "audit-halves", pair).permutation(rows)[: rows // 2]] = True
        seen[2 * pair + 1] = ~seen[2 * pair]
    return seen


def unseen(figures: Losses, seen: NDArray[np.bool_]) -> Losses:
    """Return of each row's figures those of the references that did not see it, [references / 2, rows]."""
    return np.stack([figures[~seen[:, row], row] for row in range(figures.shape[1])], axis=1)
