"""What the privacy ledger says to people: spent and left by data set, and all rows as text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from quorate.client.privacy.budgets import Budgets
from quorate.client.privacy.ledger_records import ProtectedData, Reservation, StoredRow, canonical
from quorate.shared.config.config_model import ConfigModel

UNCAPPED_DELTA = 1e-5
"""Delta at which the epsilon of data without a budget is stated."""


class Account(ConfigModel):
    """What was spent on one data set, in one unit of privacy."""

    data: str
    """Data alias; for data without a budget, all aliases that runs used."""
    places: tuple[str, ...]
    """Where the data lie; what was spent in any of these places counts."""
    group: str | None
    """Column of the groups where a budget is by group; None: by record."""
    entries: int
    """Reservations, each of one round of one run."""
    epsilon: float | None
    """Epsilon of all of them together [nats], by privacy loss distributions; None: infinite."""
    delta: float
    """Delta of that epsilon: the budget's."""
    max_epsilon: float | None
    """The cap; None where the data have no budget."""

    @property
    def remaining(self) -> float | None:
        """The cap less what is spent. A run may take less of it than its own epsilon: they do not add up."""
        if self.max_epsilon is None:
            return None
        return 0.0 if self.epsilon is None else max(self.max_epsilon - self.epsilon, 0.0)


def accounts(budgets: Budgets, entries: Sequence[Reservation]) -> list[Account]:
    """Return an account for each budget, then one for each data set without any that was spent from.

    Raises: ConfigError: a source names an unset variable.
    """
    found = []
    capped: list[ProtectedData] = []
    for budget in budgets.site.policy.privacy_budgets:
        counted = budgets.counted(budget)
        capped.append(counted)
        found.append(_account(budgets, entries, counted, budget.data, budget.delta, budget.max_epsilon))
    for protects in dict.fromkeys(entry.protects for entry in entries):
        if not any(each.shares_units_with(protects) for each in capped):
            sharing = [entry.alias for entry in entries if protects.shares_units_with(entry.protects)]
            aliases = ", ".join(dict.fromkeys(sharing))
            found.append(_account(budgets, entries, protects, aliases, UNCAPPED_DELTA, None))
    return found


def json_line(row: StoredRow) -> str:
    """Return a row of the database as one JSON object: its hash, and what is hashed.

    Content that is no canonical JSON, as the ledger never writes it, is given as a text.
    """
    content: object = row.content
    if isinstance(content, str):
        try:
            parsed = json.loads(content)
            content = parsed if canonical(parsed) == content else content
        except ValueError:
            pass  # not JSON: the text itself is what there is to show
    return json.dumps({"hash": row.hash, "row": content}, ensure_ascii=False, default=repr)


def _account(
    budgets: Budgets,
    entries: Sequence[Reservation],
    counted: ProtectedData,
    data: str,
    delta: float,
    max_epsilon: float | None,
) -> Account:
    events = [entry.event for entry in entries if counted.shares_units_with(entry.protects)]
    epsilon = budgets.accountant(events, delta)
    return Account(
        data=data,
        places=counted.places,
        group=counted.group,
        entries=len(events),
        epsilon=epsilon if math.isfinite(epsilon) else None,
        delta=delta,
        max_epsilon=max_epsilon,
    )
