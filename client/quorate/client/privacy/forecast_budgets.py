"""What a run would leave of a site's privacy budgets: its forecast on top of what the ledger has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quorate.client.node.folder import CONNECTION_YAML, SiteFolder
from quorate.client.policy.site_config import SiteConfig
from quorate.client.privacy.account_report import UNCAPPED_DELTA
from quorate.client.privacy.budgets import Budgets, Spending, group_of, protected_data
from quorate.client.privacy.ledger import DATABASE, check, reservations, verify_of
from quorate.client.privacy.ledger_records import Reservation
from quorate.shared.config.config_model import UnboundedModel
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import RequestRefused
from quorate.shared.privacy.accounting import epsilon
from quorate.shared.privacy.privacy_event import PrivacyEvent
from quorate.shared.privacy.run_cost import Forecast, Plan


class BudgetForecast(UnboundedModel):
    """One budget of the site that the run would spend from, or its data where none caps them.

    Epsilons are of all events together, as the ledger has them, and may be infinite.
    """

    data: str
    group: str | None
    """Column of the groups; None: by record."""
    delta: float
    """Delta of all epsilons: the budget's, or what `quorate site ledger show` takes for data without one."""
    max_epsilon: float | None
    """The cap; None where the data have no budget."""
    entries: int
    """Rounds of earlier runs in the ledger that count against it."""
    spent: float
    """Epsilon of these."""
    after: float
    """Epsilon of these and of this run."""
    alternatives: dict[str, float]
    """The same with other settings: change -> epsilon."""


@dataclass(frozen=True)
class AgainstLedger:
    """What a run would do to a site's ledger and budgets; the fields are those of `SiteForecast`."""

    ledger: str | None
    budgets: tuple[BudgetForecast, ...]
    refusal: str | None
    refused: tuple[str, ...]


def against_ledger(run: RunConfig, site: SiteConfig, base_dir: Path, found: Forecast) -> AgainstLedger:
    """Return what the run would do to the spending of its data, and whether the site would refuse it.

    The ledger is read as `quorate site ledger verify` reads it, and may be in use; no row is written. A
    folder that no start-up kit was unpacked to has none, and its budgets are shown as if nothing was spent.

    Args:
        run: with record- or group-level privacy.
        found: the forecast for the site's rows.
    Raises: LedgerError: the ledger is not what was written. ConfigError: a source names an unset variable.
    """
    here = SiteFolder.find(base_dir) if (base_dir / CONNECTION_YAML).is_file() else None
    entries = _entries(here) if here else []
    budgets = Budgets(site, base_dir, epsilon)
    protects = protected_data(site, base_dir, run.data, group_of(run, site))
    applying = budgets.applying(protects)
    forecasts = [
        _forecast((each.data, each.group, each.delta, each.max_epsilon), budgets.spent(each, entries), found)
        for each in applying
    ]
    if here and not applying:
        events = [entry.event for entry in entries if protects.shares_units_with(entry.protects)]
        forecasts.append(_forecast((run.data, protects.group, UNCAPPED_DELTA, None), events, found))

    def refusal(plan: Plan) -> str | None:
        try:
            budgets.admit(run)
            budgets.check(Spending(run.data, protects, plan.event, 1), entries, plan.event)
        except RequestRefused as refused:
            return str(refused)
        return None

    return AgainstLedger(
        ledger=str(here.ledger / DATABASE) if here else None,
        budgets=tuple(forecasts),
        refusal=refusal(found.configured),
        refused=tuple(plan.change for plan in found.alternatives if refusal(plan) is not None),
    )


def _forecast(
    budget: tuple[str, str | None, float, float | None], events: Sequence[PrivacyEvent], found: Forecast
) -> BudgetForecast:
    """Return the forecast of a budget, given as its data, group, delta and cap."""
    data, group, delta, max_epsilon = budget
    return BudgetForecast(
        data=data,
        group=group,
        delta=delta,
        max_epsilon=max_epsilon,
        entries=len(events),
        spent=epsilon(events, delta),
        after=epsilon([*events, found.configured.event], delta),
        alternatives={plan.change: epsilon([*events, plan.event], delta) for plan in found.alternatives},
    )


def _entries(site: SiteFolder) -> list[Reservation]:
    verdict = verify_of(site)
    check(verdict.findings)
    return reservations(verdict.rows)
