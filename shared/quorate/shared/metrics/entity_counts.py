"""What rows count of the entities in them, summed over rows: for each type those right, wrong and missed.

Entities of one sentence hang together, so sentences are what is independent, and how sure a figure is follows
from the products of a sentence's counts (`quorate.shared.metrics.intervals`). They are sent as sums over a
site's rows, `ixj` for the counts i <= j, with 3 * type + (0 right, 1 wrong, 2 missed) as a count's number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from quorate.shared.errors import ProtocolError
from quorate.shared.metrics.intervals import Array, MeanOfRatios, UnitCounts
from quorate.shared.metrics.outcomes import Outcomes

_LINES = {
    "precision": ((1, 0, 0), (1, 1, 0)),
    "recall": ((1, 0, 0), (1, 0, 1)),
    "f1": ((2, 0, 0), (2, 1, 1)),
}
"""What of (right, wrong, missed) stands above and below the line of a rate."""


def sums_of_products(rows: Iterable[Sequence[tuple[int, int]]], types: int) -> dict[str, float]:
    """Return sums over rows, each given by its (type, what became of it); those that are 0 are left out."""
    total = np.zeros((3 * types, 3 * types))
    for row in rows:
        counts = np.zeros(3 * types)
        for kind, what in row:
            counts[3 * kind + what] += 1
        total += np.outer(counts, counts)
    return {f"{i}x{j}": float(total[i, j]) for i, j in zip(*np.triu(total).nonzero(), strict=True)}


def unit_counts(outcomes: Outcomes, types: int) -> UnitCounts:
    """Return what rows count, from counts of (type, what became of it) and the sums above."""
    totals, products = np.zeros(3 * types), np.zeros((3 * types, 3 * types))
    for (kind, what), count in zip(outcomes.values, outcomes.counts, strict=True):
        totals[3 * kind + what] = count
    for name, value in outcomes.sums.items():
        i, j = map(int, name.split("x"))
        products[i, j] = products[j, i] = value
    return UnitCounts(totals, products)


def ratios(types: int) -> dict[str, MeanOfRatios]:
    """Return precision, recall and f1 over all types, and macro_f1."""
    each, every = np.eye(types), np.ones((1, types))

    def metric(line: str, over: Array) -> MeanOfRatios:
        above, below = (np.kron(over, np.array([part], dtype=np.float64)) for part in _LINES[line])
        return MeanOfRatios(above.astype(np.float64), below.astype(np.float64))

    return {**{line: metric(line, every) for line in _LINES}, "macro_f1": metric("f1", each)}


def check_products(outcomes: Outcomes, types: int) -> None:
    """Raise ProtocolError unless the sums can be products of what so many rows count.

    Counts are whole numbers, so their squares are no smaller; and sums of products keep to the inequality of
    Cauchy and Schwarz.
    """
    known = {f"{i}x{j}" for i in range(3 * types) for j in range(i, 3 * types)}
    if outcomes.sums.keys() - known:
        raise ProtocolError("sent sums that are not products of two counts.", kind="unknown-sums")
    counts = unit_counts(outcomes, types)
    squares = counts.products.diagonal().clip(min=0)
    fewest = np.maximum(counts.totals, counts.totals**2 / max(outcomes.rows, 1))
    possible = (
        (squares >= fewest * (1 - 1e-9)).all()
        and (squares <= counts.totals**2).all()
        and (counts.products >= 0).all()
        and (counts.products <= np.sqrt(np.outer(squares, squares)) * (1 + 1e-9)).all()
    )
    if not possible:
        raise ProtocolError("sent products that no counts of so many rows have.", kind="impossible-products")
