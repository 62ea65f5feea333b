"""Step 8 of a round: measure a model per site and pooled, with intervals on request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from quorate.server.tracking.records import Evaluation, LocalGain
from quorate.shared.metrics.intervals import Estimate, difference, estimate
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.protocol.messages import Split
from quorate.shared.tasks.task import Metrics, Task


def scalars(metrics: Metrics) -> dict[str, float]:
    """Return the top-level figures that are compared."""
    return {name: value for name, value in metrics.items() if isinstance(value, float)}


def summarise(
    task: Task, split: Split, outcomes: Mapping[str, Outcomes], *, intervals: bool = False
) -> Evaluation:
    """Turn the sites' outcomes into figures per site, pooled over all rows, and as a mean over sites.

    Args:
        outcomes: site -> outcomes; sites without rows are left out of the figures.
    """
    present = {site: outcomes[site] for site in sorted(outcomes) if outcomes[site].rows}
    pooled = Outcomes.pooled(present.values())
    sites = {site: task.metrics(each) for site, each in present.items()}
    names = scalars(task.metrics(pooled))
    found: dict[str, Any] = {}
    if intervals and present:
        of_sites = {site: intervals_of(task, each) for site, each in present.items()}
        if (of_pooled := intervals_of(task, pooled)) or any(of_sites.values()):
            found = {"pooled": of_pooled, "sites": of_sites}
    return Evaluation(
        split=split,
        pooled=task.metrics(pooled),
        mean={name: float(np.mean([sites[site][name] for site in sites])) for name in names},
        sites=sites,
        rows={site: each.rows for site, each in present.items()},
        intervals=found,
    )


def intervals_of(task: Task, outcomes: Outcomes) -> dict[str, list[float]]:
    """Return the 95 % interval [low, high] of every metric that has one (`quorate.shared.metrics`)."""
    found = {}
    for metric, each in _estimates(task, outcomes).items():
        if (bounds := each.interval) is not None:
            found[metric] = list(bounds)
    return found


def _estimates(task: Task, outcomes: Outcomes) -> dict[str, Estimate]:
    metrics = task.ratios(outcomes)
    if not metrics:
        return {}
    counts = task.unit_counts(outcomes)
    found = {name: estimate(metric, counts) for name, metric in metrics.items()}
    return {name: each for name, each in found.items() if each is not None}


def local_gain(
    task: Task, metric: str, federated: Outcomes, local: Outcomes, *, intervals: bool
) -> LocalGain:
    """Return what the federation brought a site on its own test rows.

    The two models' figures are taken for independent: pairing them would need both predictions of each row,
    which do not leave a site. The interval is therefore wider than a paired one. A gain is positive where the
    federated model is the better one, also by a metric of which less is better.
    """
    ours, theirs = task.metrics(federated)[metric], task.metrics(local)[metric]
    gain = task.sign(metric) * (ours - theirs)
    bounds = None
    if intervals:
        a, b = (_estimates(task, each).get(metric) for each in (federated, local))
        bounds = difference(a, b) if a and b else None
    return LocalGain(metric=metric, federated=ours, local_only=theirs, gain=gain, interval=bounds)
