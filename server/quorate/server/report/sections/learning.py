"""How the model learnt over the rounds, and what the sites' data look like."""

from __future__ import annotations

from collections.abc import Mapping

from quorate.server.report import figures
from quorate.server.report.drawing import charts
from quorate.server.report.drawing.curves import Curve, curves
from quorate.server.report.drawing.svg import FEDERATED, OTHER, SERIES, variable
from quorate.server.report.figures import DASH, count, metric_name, show
from quorate.server.report.page import Cell, Chart, Section, Table
from quorate.server.report.run_files import RunFiles, value_of
from quorate.server.report.sections.headline import why_unmeasured
from quorate.server.tracking.records import RoundMetrics
from quorate.shared.config.privacy_config import SitePrivacy
from quorate.shared.protocol.messages import Split

_TRAIN_LOSS = "train_loss"


def learning_section(files: RunFiles) -> Section:
    """Draw the validation metric, pooled and per site, and the training loss per site."""
    section = Section("learning", "How it learnt")
    validated = [each for each in files.metrics if value_of(each.validation, files.metric) is not None]
    hidden = files.config.hides_participation
    trained = [each for each in files.metrics if each.train or hidden]
    if not trained:
        section.say("No round was finished, so there is nothing to show.")
        return section
    best = files.best.round if files.best else None
    if validated:
        best_words = f" The best round by it, {best}, is the one whose adapter is kept." if best else ""
        if not files.picks_best:
            best_words = (
                " The last round's adapter is kept: no noise hides which one these rows would choose."
            )
        section.say(
            f"After each evaluated round the new model was tested on the sites' validation rows.{best_words}"
        )
        section.blocks.append(_validation_chart(files, validated))
    else:
        why = "as no site has validation rows"
        if not files.config.evaluation.share_outcomes:
            why = "as the run has sites send no outcomes (evaluation.share_outcomes)"
        elif any(each.validation and each.validation.missing for each in files.metrics):
            why = f"for want of an answer that counts ({why_unmeasured(files)})"
        section.say(
            f"The model was not tested between rounds, {why}; the last round's model is kept.", "note"
        )
    losses = _train_losses(trained)
    if losses:
        section.blocks.append(_loss_chart(losses))
    else:
        why = "Whose training loss there is, is hidden" if hidden else "The sites report no training loss"
        section.say(f"{why}.", "note")
    section.blocks.append(_table(files, trained))
    return section


def _colours(sites: list[str]) -> dict[str, str]:
    """Give each site a colour of its own, or all the same one where there are too many."""
    if len(sites) > len(SERIES):
        return dict.fromkeys(sites, OTHER)
    return dict(zip(sites, SERIES, strict=False))


def _lines(points: Mapping[str, list[tuple[int, float]]]) -> list[Curve]:
    colours = _colours(sorted(points))
    return [Curve(site, points[site], colours[site]) for site in sorted(points)]


def _grey(lines: list[Curve], what: str) -> list[tuple[str, str]]:
    """Explain grey lines, which carry no names."""
    return [(variable(OTHER), what)] if any(line.colour == OTHER for line in lines) else []


def _validation_chart(files: RunFiles, validated: list[RoundMetrics]) -> Chart:
    metric = files.metric
    pooled, sites = [], dict[str, list[tuple[int, float]]]()
    for each in validated:
        value = value_of(each.validation, metric)
        assert value is not None and each.validation is not None  # the caller's choice of rounds
        pooled.append((each.round, value))
        for site in each.validation.sites:
            own = value_of(each.validation, metric, site)
            if own is not None:
                sites.setdefault(site, []).append((each.round, own))
    lines = _lines(sites) if len(sites) > 1 else []
    kept = "best" if files.picks_best else "kept"
    mark = (files.best.round, f"{kept}: round {files.best.round}") if files.best and len(pooled) > 1 else None
    svg = curves(
        [Curve("all rows", pooled, FEDERATED, strong=True), *lines],
        name="validation",
        title=f"{metric_name(metric)} on validation rows, by round",
        description=f"All rows together: from {show(metric, pooled[0][1])} after round {pooled[0][0]} to "
        f"{show(metric, pooled[-1][1])} after round {pooled[-1][0]}.",
        metric=metric,
        mark=mark,
    )
    title = f"{metric_name(metric)} on validation rows"
    return Chart(svg, _grey(lines, "one grey line per site"), wide=False, title=title)


def _train_losses(trained: list[RoundMetrics]) -> dict[str, list[tuple[int, float]]]:
    losses: dict[str, list[tuple[int, float]]] = {}
    for each in trained:
        for site, found in each.train.items():
            loss = figures.number(found.get(_TRAIN_LOSS))
            if loss is not None:
                losses.setdefault(site, []).append((each.round, loss))
    return losses


def _loss_chart(losses: Mapping[str, list[tuple[int, float]]]) -> Chart:
    lines = _lines(losses)
    svg = curves(
        lines,
        name="loss",
        title="Training loss of each site, by round",
        description="; ".join(
            f"{line.label}: from {line.points[0][1]:.3g} to {line.points[-1][1]:.3g}" for line in lines
        ),
        metric="loss",
    )
    legend = _grey(lines, "one grey line per site")
    return Chart(svg, legend, wide=False, title="Training loss at each site (lower is better)")


def _table(files: RunFiles, trained: list[RoundMetrics]) -> Table:
    metric = files.metric
    sites = sorted({site for each in files.metrics if each.validation for site in each.validation.sites})
    named = sites if 1 < len(sites) <= len(SERIES) else []
    best = files.best.round if files.best else None
    kept = "best" if files.picks_best else "kept"
    rows = []
    for each in trained:
        losses = [
            v for found in each.train.values() if (v := figures.number(found.get(_TRAIN_LOSS))) is not None
        ]
        rows.append(
            [
                Cell(f"{each.round}" + (f" ({kept})" if each.round == best else "")),
                Cell(show(metric, value_of(each.validation, metric)), "strong"),
                *(Cell(show(metric, value_of(each.validation, metric, site))) for site in named),
                Cell(f"{sum(losses) / len(losses):.3g}" if losses else DASH),
            ]
        )
    if not sites:
        rows = [[row[0], row[-1]] for row in rows]
        return Table("The same in figures", ["Round", "Mean training loss"], rows, folded=True)
    columns = ["Round", "All rows", *named, "Mean training loss"]
    return Table(f"The same in figures: {metric_name(metric)} on validation rows", columns, rows, folded=True)


def data_section(files: RunFiles) -> Section:
    """Show each site's mix of labels, its rows, and what it wants to be known."""
    section = Section("data", "What the sites' data look like")
    sites = files.summary.sites if files.summary else {}
    if not sites:
        section.say("The sites' counts are written with the summary when the run ends; there is none yet.")
        return section
    totals: dict[str, int] = {}
    for description in sites.values():
        for label, rows in description.label_counts.items():
            totals[label] = totals.get(label, 0) + rows
    section.say(
        "Counts that the sites told of themselves. "
        + (
            "The more the mixes differ, the harder it is to learn one model for all."
            if len(sites) > 1
            else "There is one site, so its mix is everybody's."
        )
    )
    if sum(totals.values()):
        section.blocks.append(_mix_chart(files, totals))
    else:
        section.say(
            "The sites count no labels: exact counts would tell what their privacy hides."
            if isinstance(files.config.privacy, SitePrivacy)
            else "This task has no labels to count.",
            "note",
        )
    section.blocks.append(_rows_table(files))
    if sum(totals.values()):
        section.blocks.append(_counts_table(files, totals))
    notes = [
        [Cell(site), Cell(f"{note.rstrip('.')}.")] for site in sorted(sites) for note in sites[site].notes
    ]
    if notes:
        section.blocks.append(Table("What the sites want known", ["Site", "Note"], notes, words=(1,)))
    return section


def _mix_chart(files: RunFiles, totals: Mapping[str, int]) -> Chart:
    assert files.summary is not None  # the caller looked
    sites = files.summary.sites
    top = list(totals) if len(totals) <= len(SERIES) else sorted(totals, key=lambda each: -totals[each])[:7]
    rest = len(totals) - len(top)
    shown = sorted(sites, key=lambda site: (-sum(sites[site].label_counts.values()), site))[:24]
    rows = []
    for site in sorted(shown):
        counts = sites[site].label_counts
        whole = max(sum(counts.values()), 1)
        parts = [counts.get(label, 0) / whole for label in top]
        padding = [0.0] * (len(SERIES) - len(top)) if rest else []
        rows.append(
            (
                site,
                f"{sites[site].rows.get('train', 0):,}",
                [*parts, *padding, 1 - sum(parts)] if rest else parts,
            )
        )
    svg = charts.shares(
        rows,
        name="mix",
        title="Share of each label in the training rows of each site",
        description="; ".join(f"{site}: {note} training rows" for site, note, _ in rows),
    )
    legend = [(variable(SERIES[i]), label) for i, label in enumerate(top)]
    legend += [(variable(OTHER), f"{rest} other labels")] if rest else []
    title = f"Labels of the training {files.config.task.counted}; at the right the number of rows"
    if len(shown) < len(sites):
        title += f" (the {len(shown)} largest of {len(sites)} sites)"
    return Chart(svg, legend, title=title)


def _rows_table(files: RunFiles) -> Table:
    assert files.summary is not None  # the caller looked
    sites = files.summary.sites
    splits: tuple[Split, ...] = ("train", "validation", "test")
    rows = [[site, *(f"{sites[site].rows.get(split, 0):,}" for split in splits)] for site in sorted(sites)]
    sums = [sum(each.rows.get(split, 0) for each in sites.values()) for split in splits]
    total = [Cell("All", "strong"), *(Cell(f"{each:,}", "strong") for each in sums)]
    caption = f"Rows of {count(len(sites), 'site')}"
    return Table(caption, ["Site", "Training", "Validation", "Test"], [*rows, total])


def _counts_table(files: RunFiles, totals: Mapping[str, int]) -> Table:
    assert files.summary is not None  # the caller looked
    sites = files.summary.sites
    names = sorted(sites) if len(sites) <= 8 else []
    rows = [
        [
            Cell(label),
            *(
                Cell(f"{n:,}", "bad" if n == 0 else "")
                for n in (sites[site].label_counts.get(label, 0) for site in names)
            ),
            Cell(f"{total:,}", "strong"),
        ]
        for label, total in totals.items()
    ]
    return Table(
        f"Training {files.config.task.counted} of each label", ["Label", *names, "All"], rows, folded=True
    )
