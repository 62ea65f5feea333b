"""Several runs that differ in their seed alone, side by side: means with intervals over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from quorate.server.results.outputs import read_summary
from quorate.server.rounds.evaluation import scalars
from quorate.server.rounds.run import RUN_FILE, SUMMARY_FILE
from quorate.server.tracking.records import Evaluation, Record, Summary
from quorate.shared.config.load import load_run
from quorate.shared.errors import OutputError


class Figure(Record):
    """One figure over several seeds."""

    mean: float
    low: float
    """Lower end of the 95 % t-interval of the mean."""
    high: float
    values: tuple[float, ...]
    """One value per seed, in the order of seeds."""


class Comparison(Record):
    """Test figures of several runs that differ in their seed alone, of each run's best round."""

    name: str
    seeds: tuple[int, ...]
    metrics: tuple[str, ...]
    pooled: dict[str, dict[str, Figure]]
    """Model (`federated`, `centralised`, `local only: SITE`) -> metric -> figure on all sites' rows."""
    sites: dict[str, dict[str, dict[str, Figure]]]
    """Site -> model (`federated`, `centralised`, `local only`) -> metric -> figure on the site's own rows."""


def compare(folders: Sequence[Path]) -> Comparison:
    """Read finished runs and set them side by side.

    Raises: OutputError: a folder holds no finished run, the runs differ in more than their seed, or two have
        the same seed.
    """
    summaries = sorted((_read(folder) for folder in folders), key=lambda summary: summary.seed)
    _check_same_but_seed(folders)
    tested = [summary.best.test for summary in summaries if summary.best and summary.best.test]
    metrics = tuple(scalars(tested[0].pooled))
    models = [_models(summary) for summary in summaries]
    common = [model for model in models[0] if all(model in each for each in models)]
    everywhere = {
        model: {metric: _figure([m[model].pooled[metric] for m in models]) for metric in metrics}
        for model in common
        if all(_everywhere(m[model], m["federated"].sites) for m in models)
    }
    sites = {
        site: {
            label: {metric: _figure([m[model].sites[site][metric] for m in models]) for metric in metrics}
            for model, label in _at_home(common, site)
        }
        for site in tested[0].sites
        if all(site in each.sites for each in tested)  # one that was set aside in a run has no mean
    }
    seeds = tuple(summary.seed for summary in summaries)
    return Comparison(name=summaries[0].name, seeds=seeds, metrics=metrics, pooled=everywhere, sites=sites)


def markdown(comparison: Comparison) -> str:
    """Return the comparison as two Markdown tables: on all sites' rows, and at home."""
    chosen = [metric for metric in comparison.metrics if metric != "loss"]
    lines = [f"| tested on all sites' rows | {' | '.join(chosen)} |", "|---" * (len(chosen) + 1) + "|"]
    for model, figures in comparison.pooled.items():
        lines.append(f"| {model} | {' | '.join(_shown(figures[metric]) for metric in chosen)} |")
    first = chosen[0]
    labels = list(dict.fromkeys(label for models in comparison.sites.values() for label in models))
    lines += ["", f"| tested at home ({first}) | {' | '.join(labels)} |", "|---" * (len(labels) + 1) + "|"]
    for site, models in comparison.sites.items():
        lines.append(f"| {site} | {' | '.join(_home(models, label, first) for label in labels)} |")
    seeds = ", ".join(map(str, comparison.seeds))
    return "\n".join(
        [*lines, "", f"Mean over seeds {seeds}, with the 95 % t-interval where there are several."]
    )


def _home(models: Mapping[str, Mapping[str, Figure]], label: str, metric: str) -> str:
    """A site whose reference run failed in one of the runs has no mean of it."""
    return _shown(models[label][metric]) if label in models else "-"


def _shown(figure: Figure) -> str:
    if len(figure.values) < 2:
        return f"{figure.mean:.3f}"
    return f"{figure.mean:.3f} ± {figure.high - figure.mean:.3f}"


def _figure(values: Sequence[float]) -> Figure:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Figure(mean=mean, low=mean, high=mean, values=tuple(values))
    from scipy.stats import t

    quantile = float(t.ppf(0.975, len(values) - 1))
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Figure(mean=mean, low=mean - half, high=mean + half, values=tuple(values))


def _models(summary: Summary) -> dict[str, Evaluation]:
    models = {"federated": summary.best}
    if summary.references:
        models["centralised"] = summary.references.centralised
        models |= {f"local only: {site}": each for site, each in summary.references.local_only.items()}
    return {name: measured.test for name, measured in models.items() if measured and measured.test}


def _everywhere(evaluation: Evaluation, sites: Iterable[str]) -> bool:
    """Whether it is on all of these sites' rows; a federation tests local-only adapters at home alone."""
    return set(evaluation.sites) >= set(sites)


def _at_home(models: Sequence[str], site: str) -> list[tuple[str, str]]:
    """Return (model, column) of the models that are compared on a site's own rows."""
    local = f"local only: {site}"
    return [
        (model, "local only" if model == local else model)
        for model in models
        if ":" not in model or model == local
    ]


def _read(folder: Path) -> Summary:
    try:
        summary = read_summary(folder)
    except (OSError, ValidationError, ValueError) as error:
        message = f"{folder} has no readable {SUMMARY_FILE}; give folders of finished runs."
        raise OutputError(message) from error
    if summary.best is None or summary.best.test is None:
        message = f"{folder} holds a run that did not finish ({summary.status}); continue it with --resume."
        raise OutputError(message)
    if not summary.best.test.pooled:
        raise OutputError(f"{folder} holds a run whose sites have no test rows: there is nothing to compare.")
    return summary


def _check_same_but_seed(folders: Sequence[Path]) -> None:
    first = load_run(folders[0] / RUN_FILE)
    seen = {first.seed: folders[0]}
    for folder in folders[1:]:
        other = load_run(folder / RUN_FILE)
        if other.seed in seen:
            raise OutputError(
                f"{folder} and {seen[other.seed]} both have seed {other.seed}, so they say nothing about "
                "chance; give runs with different seeds.",
                kind="same-seed",
            )
        seen[other.seed] = folder
        if other.model_copy(update={"seed": first.seed}) != first:
            raise OutputError(
                f"{folder} and {folders[0]} differ in more than their seed, so a mean over them means "
                "nothing; compare runs of one run file.",
                kind="settings-differ",
            )
