"""What the trials of a search spend of the sites' privacy together: each trains on the same rows again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quorate.client.privacy.units import plan_of
from quorate.client.site.data_source import SiteRows
from quorate.client.trainer.dp.plan import PrivatePlan
from quorate.client.trainer.sampling import few_shot
from quorate.server.tracking.records import Record
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ConfigError, DataError
from quorate.shared.privacy.accounting import epsilon
from quorate.shared.privacy.rounding import at_most, delta_shown
from quorate.shared.tasks.task import Row


class SearchSpending(Record):
    """Record- or group-level privacy of all trials together, at the site where that is most."""

    site: str
    """Whose rows."""
    trials: int
    """Trials that were counted, each with all its rounds, whether it came to its end or not."""
    epsilon: float
    """Of all of them composed, by privacy loss distributions."""
    delta: float
    """The largest of the trials' own."""

    @property
    def sentence(self) -> str:
        """In words, for terminals and pages."""
        return (
            f"Every trial spends privacy of its own: {self.trials} of them together come to epsilon "
            f"{at_most(self.epsilon)} at delta {delta_shown(self.delta)} for the rows of {self.site}, which "
            "no report of a single run says. Figures on validation rows, which chose among them, hold no "
            "noise."
        )


def privacy_cost(rows: Mapping[str, SiteRows], trials: Sequence[RunConfig]) -> SearchSpending | None:
    """Return what these runs spend together; None where none has record- or group-level privacy.

    Args:
        rows: site -> split -> rows.
        trials: their runs.
    """
    found = []
    for site, splits in rows.items():
        plans = [plan for run in trials if (plan := _plan(run, site, splits.get("train", ()))) is not None]
        if plans:
            delta = max(plan.delta for plan in plans)
            events = [plan.whole_event() for plan in plans]
            found.append((epsilon(events, delta), site, len(plans), delta))
    if not found:
        return None
    total, site, count, delta = max(found)
    return SearchSpending(site=site, trials=count, epsilon=total, delta=delta)


def _plan(run: RunConfig, site: str, train: Sequence[Row]) -> PrivatePlan | None:
    """Return what a site does in a trial; None where it adds no noise, or is refused when it joins."""
    try:
        plan = plan_of(run, site, few_shot(run, site, train))
        if plan is not None:
            plan.claim()
        return plan
    except (ConfigError, DataError):  # the trial says why, and trains on nothing of this site
        return None
