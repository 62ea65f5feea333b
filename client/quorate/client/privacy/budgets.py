"""Privacy budgets of a site: which data sets are one, what each has spent, and what still fits.

Epsilon is never summed: all events on a data set go through the accountant together, with those to come.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quorate.client.policy.site_config import PrivacyBudget, SiteConfig
from quorate.client.privacy.ledger_records import ProtectedData, Reservation
from quorate.shared.config.privacy_config import SitePrivacy
from quorate.shared.errors import RequestRefused
from quorate.shared.model.sources import expand
from quorate.shared.privacy.privacy_event import PrivacyEvent
from quorate.shared.privacy.rounding import at_most

if TYPE_CHECKING:
    from quorate.shared.config.run_config import (
        RunConfig,  # torch, which `site ledger show` need not wait for
    )

Accountant = Callable[[Sequence[PrivacyEvent], float], float]
"""(events, delta) -> epsilon of all of them together."""


@dataclass(frozen=True)
class Spending:
    """What a run costs at this site.

    Args:
        alias: the data alias that it names.
        protects: the data set and the unit of privacy.
        event: what one round does.
        rounds: of the run.
    """

    alias: str
    protects: ProtectedData
    event: PrivacyEvent
    rounds: int

    def over(self, rounds: int) -> PrivacyEvent:
        """Return what so many rounds do."""
        return self.event.model_copy(update={"steps": rounds * self.event.steps})


def places(source: str, base_dir: Path, where: str) -> tuple[str, ...]:
    """Return where a source lies: as written, and with links followed, where that is another place.

    Both, so that neither a second link to the data nor a link that points elsewhere tomorrow begins a new
    count. Nothing has to be there.
    Raises: ConfigError: an unset variable.
    """
    text = expand(source, where)
    if text.partition(":")[0] in ("hub", "sklearn", "package"):
        return (text,)
    written = os.path.abspath(base_dir / Path(text).expanduser())  # noqa: PTH100  follows no links
    return tuple(dict.fromkeys((written, str(Path(written).resolve()))))


def protected_data(site: SiteConfig, base_dir: Path, alias: str, group: str | None) -> ProtectedData:
    """Return the data set behind an alias, with the unit of privacy.

    Raises: ConfigError: its source names an unset variable.
    """
    return ProtectedData(places=places(site.data[alias].source, base_dir, f"data.{alias}"), group=group)


def spending(
    run: RunConfig, site: SiteConfig, base_dir: Path, event_of: Callable[[RunConfig], PrivacyEvent]
) -> Spending:
    """Return what a run costs here.

    Args:
        run: its configuration, with record- or group-level privacy.
        event_of: what one round of the run does here, which takes the number of units.
    Raises: DataError, ConfigError, RequestRefused: of `event_of`.
    """
    assert isinstance(run.privacy, SitePrivacy), "only asked for where it is"
    event = event_of(run)  # which finds out whether there are groups
    protects = protected_data(site, base_dir, run.data, group_of(run, site))
    return Spending(run.data, protects, event, run.federation.rounds)


@dataclass(frozen=True)
class Budgets:
    """The budgets of one site."""

    site: SiteConfig
    base_dir: Path
    accountant: Accountant

    def counted(self, budget: PrivacyBudget) -> ProtectedData:
        """Return all places whose spending counts against a budget.

        Raises: ConfigError: a source names an unset variable.
        """
        own = protected_data(self.site, self.base_dir, budget.data, budget.group)
        where = f"policy.privacy_budgets, also of {budget.data}"
        more = [place for source in budget.also for place in places(source, self.base_dir, where)]
        return own.model_copy(update={"places": tuple(dict.fromkeys((*own.places, *more)))})

    def spent(self, budget: PrivacyBudget, entries: Iterable[Reservation]) -> list[PrivacyEvent]:
        """Return the events among `entries` that count against a budget."""
        counted = self.counted(budget)
        return [entry.event for entry in entries if counted.shares_units_with(entry.protects)]

    def admit(self, run: RunConfig) -> None:
        """Refuse a run whose kind of privacy the budgets of its data set do not know. Reads no ledger.

        Raises: RequestRefused: saying which rule.
        """
        units = dict.fromkeys(budget.group for budget in self.site.policy.privacy_budgets)
        at = protected_data(self.site, self.base_dir, run.data, None)
        known = [group for group in units if self.applying(at.model_copy(update={"group": group}))]
        if not known:
            return
        named = ", ".join("record" if group is None else f"group ({group})" for group in known)
        if not isinstance(run.privacy, SitePrivacy):
            raise RequestRefused(
                f"policy.privacy_budgets has a budget for data.{run.data}, and the run adds no noise here, "
                "which no budget covers; have the coordinator set privacy.unit to record or group.",
                code="policy-privacy",
            )
        group = group_of(run, self.site)
        if group not in known or (run.privacy.unit == "group" and group is None):
            raise RequestRefused(
                f"policy.privacy_budgets has budgets for data.{run.data} by {named}, the run protects by "
                f"{run.privacy.unit}; add a budget for that, or have the coordinator change privacy.unit.",
                code="policy-budget",
            )

    def check(self, spending: Spending, entries: Sequence[Reservation], more: PrivacyEvent) -> None:
        """Refuse what would take a data set above its cap.

        Args:
            entries: all reservations of the ledger.
            more: what is to come on top of them.
        Raises: RequestRefused: with rule, value and remedy.
        """
        for budget in self.applying(spending.protects):
            total = self.accountant([*self.spent(budget, entries), more], budget.delta)
            if total > budget.max_epsilon:
                now = self.accountant(self.spent(budget, entries), budget.delta)
                raise RequestRefused(
                    f"policy.privacy_budgets: data.{budget.data} may spend epsilon {budget.max_epsilon:g} "
                    f"at delta {budget.delta:g}; {at_most(now, 4)} is spent, and with the {more.steps} "
                    f"steps asked for it would be {at_most(total, 4)}; have the coordinator ask for fewer "
                    "rounds or more noise, or raise max_epsilon in site.yaml if your people agree.",
                    code="policy-budget",
                )

    def applying(self, protects: ProtectedData) -> list[PrivacyBudget]:
        """Return the budgets that spending on these data counts against."""
        return [
            budget
            for budget in self.site.policy.privacy_budgets
            if self.counted(budget).shares_units_with(protects)
        ]


def group_of(run: RunConfig, site: SiteConfig) -> str | None:
    """Return the column that says whose row it is, where a run protects groups and one is mapped."""
    by_group = isinstance(run.privacy, SitePrivacy) and run.privacy.unit == "group"
    return site.data[run.data].columns.get("group") if by_group else None


def to_come(spending: Spending, entries: Iterable[Reservation], run_id: str) -> PrivacyEvent:
    """Return what those rounds of a run do that are not in the ledger yet; of a resumed run some are."""
    begun = {entry.request.round for entry in entries if entry.request.run_id == run_id}
    return spending.over(sum(round not in begun for round in range(1, spending.rounds + 1)))
