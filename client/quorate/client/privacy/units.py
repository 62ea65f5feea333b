"""What a site does for a run with record- or group-level privacy beside its training.

The number of training rows (and of groups) is sent and taken as public. Everything else that follows from
training rows without noise stays here: label counts, notes, numbers of tokens, figures on training rows,
how long a request took (`quorate.shared.protocol.leaves` lists all). When an answer comes does depend on the
rows that were drawn, and whoever waits for it can measure that; `policy.answer_grid_seconds` makes it coarse.
"""

from __future__ import annotations

from collections.abc import Sequence

from quorate.client.trainer.dp.plan import PrivatePlan, private_plan
from quorate.shared.config.privacy_config import SitePrivacy
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ConfigError, DataError, RequestRefused
from quorate.shared.protocol.messages import Split
from quorate.shared.tasks.task import Row


def groups_of(run: RunConfig, site: str, rows: Sequence[Row]) -> list[str] | None:
    """Return each training row's group where the unit of privacy is a group.

    Raises: DataError: naming the site, whose data have no group column.
    """
    if not isinstance(run.privacy, SitePrivacy) or run.privacy.unit != "group":
        return None
    groups = [row.group for row in rows if row.group is not None]
    if len(groups) < len(rows):
        raise DataError(
            f"site {site}: privacy.unit group protects all rows of a group, but data.{run.data} does not say "
            "whose row each is; map the column, such as `columns: {group: patient_id}`.",
            kind="no-group-column",
        )
    return groups


def check_groups_apart(
    run: RunConfig, site: str, training: Sequence[Row], split: Split, rows: Sequence[Row]
) -> None:
    """Raise DataError for a group of the training rows that is also measured on.

    Figures on those rows are exact, and so would say something of a group that the run promises to protect.
    """
    groups = groups_of(run, site, training)
    if groups is None or split == "train":
        return
    if shared := set(groups) & {row.group for row in rows}:
        raise DataError(
            f"site {site}: {len(shared)} groups have rows in train and in {split}; privacy.unit group "
            "protects all rows of a group, and figures on measured rows are exact: put all rows of a group "
            "into one split.",
            kind="group-measured-too",
        )


def check_some(site: str, training: Sequence[Row]) -> None:
    """Raise DataError for a site without training rows."""
    if not training:
        raise DataError(f"site {site} has no training rows; give it data or take it out of the sites.")


def plan_of(run: RunConfig, site: str, rows: Sequence[Row]) -> PrivatePlan | None:
    """Return the mechanism at a site with these training rows; None without such privacy.

    Raises: DataError: no rows, or no group column where one is needed. ConfigError: delta, or an epsilon out
        of reach.
    """
    if not isinstance(run.privacy, SitePrivacy):
        return None
    check_some(site, rows)
    groups = groups_of(run, site, rows)
    try:
        return private_plan(run, len(rows) if groups is None else len(set(groups)))
    except ConfigError as error:
        raise ConfigError(f"site {site}: {error}", kind=error.kind) from error


def reported_seconds(run: RunConfig, seconds: float) -> float:
    """Return how long a site says that it worked: under record- or group-level privacy nothing (0).

    One row of unusual length shows in it, to the microsecond.
    """
    return 0.0 if isinstance(run.privacy, SitePrivacy) else seconds


def check_shares_outcomes(run: RunConfig) -> None:
    """Raise RequestRefused for figures that the run promises to keep at the sites."""
    if not run.evaluation.share_outcomes:
        raise RequestRefused(
            "evaluation.share_outcomes: the run promises that sites send nothing of what the model gets "
            "right and wrong on their rows; have the coordinator not ask for it.",
            code="policy-privacy",
        )
