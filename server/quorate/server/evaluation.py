"""Step 8 of a round: measure a model per site and pooled, with bootstrap intervals on request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from quorate.server.records import Evaluation, Worth
from quorate.shared.messages import Split
from quorate.shared.outcomes import Outcomes
from quorate.shared.seeds import rng
from quorate.shared.tasks.base import Metrics, Task

_LEVELS = (2.5, 97.5)


def scalars(metrics: Metrics) -> dict[str, float]:
    """Return the top-level figures that are compared."""
    return {name: value for name, value in metrics.items() if isinstance(value, float)}


def summarise(
    task: Task, split: Split, outcomes: Mapping[str, Outcomes], *, samples: int = 0, seed: int = 0
) -> Evaluation:
    """Turn the sites' outcomes into figures per site, pooled over all rows, and as a mean over sites.

    Args:
        outcomes: site -> outcomes; sites without rows are left out of the figures.
        samples: bootstrap resamples for 95 % intervals; 0 for none.
        seed: of the resampling.
    """
    present = {site: outcomes[site] for site in sorted(outcomes) if outcomes[site].rows}
    pooled = Outcomes.pooled(present.values())
    sites = {site: task.metrics(each) for site, each in present.items()}
    names = scalars(task.metrics(pooled))
    intervals: dict[str, Any] = {}
    if samples and _can_resample(task, pooled):
        intervals = {
            "pooled": interval(task, pooled, samples, seed, "pooled"),
            "sites": {site: interval(task, each, samples, seed, site) for site, each in present.items()},
        }
    return Evaluation(
        split=split,
        pooled=task.metrics(pooled),
        mean={name: float(np.mean([sites[site][name] for site in sites])) for name in names},
        sites=sites,
        rows={site: each.rows for site, each in present.items()},
        intervals=intervals,
    )


def _can_resample(task: Task, outcomes: Outcomes) -> bool:
    """Not of a task that says sums alone, nor of one whose outcomes are parts of a row."""
    return task.resamples and outcomes.units > 0


def resample(task: Task, outcomes: Outcomes, samples: int, seed: int, name: str) -> dict[str, list[float]]:
    """Return each scalar metric over `samples` bootstrap resamples of the rows."""
    draws: dict[str, list[float]] = {}
    if not _can_resample(task, outcomes):
        return draws
    generator = rng(seed, "bootstrap", name)
    for _ in range(samples):
        for metric, value in scalars(task.metrics(outcomes.resampled(generator))).items():
            if metric not in task.no_interval:
                draws.setdefault(metric, []).append(value)
    return draws


def interval(task: Task, outcomes: Outcomes, samples: int, seed: int, name: str) -> dict[str, list[float]]:
    """Return the 95 % percentile interval [low, high] of every scalar metric."""
    draws = resample(task, outcomes, samples, seed, name)
    return {metric: np.percentile(values, _LEVELS).tolist() for metric, values in draws.items()}


def worth(
    task: Task, metric: str, federated: Outcomes, local: Outcomes, *, samples: int, seed: int, site: str
) -> Worth:
    """Return what the federation brought `site` on its own test rows.

    The two models' rows are resampled independently: pairing them would need both predictions of each row,
    which do not leave a site. The interval is therefore wider than a paired one. A gain is positive where the
    federated model is the better one, also by a metric of which less is better.
    """
    ours, theirs = task.metrics(federated)[metric], task.metrics(local)[metric]
    sign = task.sign(metric)
    bounds = None
    a = resample(task, federated, samples, seed, f"{site}/federated").get(metric)
    b = resample(task, local, samples, seed, f"{site}/local").get(metric)
    if a and b:
        low, high = np.percentile(sign * np.subtract(a, b), _LEVELS).tolist()
        bounds = (low, high)
    gain = sign * (ours - theirs)
    return Worth(metric=metric, federated=ours, local_only=theirs, gain=gain, interval=bounds)
