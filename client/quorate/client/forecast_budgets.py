"""What a run would leave of a site's privacy budgets: its forecast on top of what the ledger has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ConfigDict

from quorate.client.budgets import Budgets, Spending, group_of, protected_data
from quorate.client.config import SiteConfig
from quorate.client.ledger import DATABASE, HEADS, check, reservations
from quorate.client.ledger_check import Anchor, verify
from quorate.client.ledger_rows import Reservation
from quorate.client.node.folder import CONNECTION_YAML, SiteFolder
from quorate.shared.config.base import ConfigModel
from quorate.shared.config.run import RunConfig
from quorate.shared.errors import RequestRefused
from quorate.shared.privacy.accounting import epsilon
from quorate.shared.privacy.events import PrivacyEvent
from quorate.shared.privacy.forecast import Forecast, Plan


class BudgetForecast(ConfigModel):
    """One budget of the site that the run would spend from; epsilons may be infinite."""

    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="strings")

    data: str
    """Data alias."""
    group: str | None
    """Column of the groups; None: a budget by record."""
    delta: float
    """Of the budget; all epsilons are at this delta."""
    max_epsilon: float
    """The cap."""
    entries: int
    """Rounds of earlier runs in the ledger that count against it."""
    spent: float
    """Epsilon of these."""
    after: float
    """Epsilon of these and of this run together, as the ledger would have it."""
    alternatives: dict[str, float]
    """The same with other settings: change -> epsilon."""


def against_budgets(
    run: RunConfig, site: SiteConfig, base_dir: Path, found: Forecast
) -> tuple[tuple[BudgetForecast, ...], str | None]:
    """Return what the run would do to each budget of its data, and why the site would refuse it, if it would.

    The ledger is read as `quorate site ledger verify` reads it, and may be in use; nothing is written. A
    folder that no start-up kit was unpacked to has none, and nothing is spent.

    Args:
        run: with record- or group-level privacy.
        site: content of site.yaml.
        base_dir: its folder.
        found: the forecast for the site's rows.
    Raises: LedgerError: the ledger is not what was written. ConfigError: a source names an unset variable.
    """
    budgets = Budgets(site, base_dir, epsilon)
    entries = _entries(base_dir)
    protects = protected_data(site, base_dir, run.data, group_of(run, site))
    forecasts = tuple(
        BudgetForecast(
            data=budget.data,
            group=budget.group,
            delta=budget.delta,
            max_epsilon=budget.max_epsilon,
            entries=len(counted),
            spent=epsilon(counted, budget.delta),
            after=epsilon([*counted, _event(found.configured)], budget.delta),
            alternatives={
                plan.change: epsilon([*counted, _event(plan)], budget.delta) for plan in found.alternatives
            },
        )
        for budget in budgets.applying(protects)
        for counted in [budgets.spent(budget, entries)]
    )
    event = _event(found.configured)
    try:
        budgets.admit(run)
        budgets.check(Spending(run.data, protects, event, 1), entries, event)
    except RequestRefused as refused:
        return forecasts, str(refused)
    return forecasts, None


def _entries(base_dir: Path) -> Sequence[Reservation]:
    if not (base_dir / CONNECTION_YAML).is_file():
        return ()
    folder = SiteFolder.find(base_dir)
    verdict = verify(folder.ledger / DATABASE, Anchor(folder.anchor / HEADS))
    check(verdict.findings)
    return reservations(verdict.rows)


def _event(plan: Plan) -> PrivacyEvent:
    """Return what all rounds of a plan do."""
    return PrivacyEvent(
        sampling_probability=plan.sampling_probability,
        noise_multiplier=plan.noise_multiplier,
        steps=plan.steps,
    )
