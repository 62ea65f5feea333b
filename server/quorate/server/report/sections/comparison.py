"""Was it worth it, for each site and on everybody's rows?"""

from __future__ import annotations

from quorate.server.report import figures
from quorate.server.report.drawing import charts
from quorate.server.report.drawing.svg import CENTRALISED, FEDERATED, LOCAL, variable
from quorate.server.report.figures import metric_name, show, show_gain, show_interval
from quorate.server.report.page import Cell, Chart, Section, Table, Tone
from quorate.server.report.run_files import RunFiles, interval_of, value_of
from quorate.server.report.sections.headline import local_gains, why_no_reference
from quorate.server.tracking.records import Evaluation, References

MOST_SITES = 24
"""Charts and matrices stop at this many sites; tables list them all."""
_TONES: dict[int, Tone] = {1: "good", 0: "", -1: "bad"}
MOST_COLUMNS = 8
"""Beyond this many sites the table of every adapter on every site's rows keeps the totals alone."""


def comparison_section(files: RunFiles) -> Section:
    """Compare the federated model with the references, on each site's own rows."""
    section = Section("worth", "Was it worth it for each site?")
    result, metric = files.result, files.metric
    if result is None:
        section.say("There are no figures to compare: nothing was measured on test or validation rows.")
        return section
    references = _references(files, result)
    meaning = figures.MEANINGS.get(metric)
    section.say(
        f"{metric_name(metric)} on each site's own {result.split} rows"
        + (f": {meaning}." if meaning else ".")
        + (
            " Thin lines across the bars' ends are 95\u00a0% intervals."
            if _has_intervals(result, metric)
            else ""
        )
    )
    sites = sorted(result.sites)
    shown = sorted(sorted(sites, key=lambda site: -result.rows.get(site, 0))[:MOST_SITES])
    section.blocks.append(_chart(files, result, references, shown))
    if len(shown) < len(sites):
        section.say(
            f"The chart shows the {len(shown)} sites with the most {result.split} rows; "
            f"the table has all {len(sites)}.",
            "muted",
        )
    section.blocks.append(_table(files, result, references, sites))
    without = [site for site in sites if interval_of(result, metric, site) is None]
    if without and _has_intervals(result, metric):
        section.say(
            f"No interval for {figures.listed(without)}: an average over classes has one from about a dozen "
            "rows for each class that occurs there. A site with one class may have it, and a larger one with "
            "several may not.",
            "muted",
        )
    if metric == "macro_f1" and len(sites) > 1:
        values = [value for site in sites if (value := value_of(result, metric, site)) is not None]
        if max(values, default=1.0) < (value_of(result, metric) or 0.0):
            section.say(
                "Why is every site below the figure for all rows? A class of which a site has few or no rows "
                "counts as much as any other in its average, so single mistakes there weigh a lot.",
                "muted",
            )
    unmeasured = [site for site in files.members if site not in result.sites]
    if unmeasured:
        section.say(f"Without {result.split} figures: {figures.listed(unmeasured)}.", "note")
    if len(sites) == 1:
        section.say("With one site there is nothing to share: the federated model is the site's own.", "note")
    elif not references.local_only and not references.centralised:
        section.say(
            f"The bars have nothing beside them to be compared with: {why_no_reference(files)}.", "note"
        )
    elif references.local_only:
        section.say(
            "Local only: the site's own adapter, trained on its rows alone with the same number of steps. "
            "The interval of a gain is on the wide side: it ignores that both models saw the same rows.",
            "muted",
        )
    for name, why in references.failed.items():
        section.say(f"Left out, as its reference run failed: {name}, which {why.reason}.", "note")
    if references.tested_everywhere:
        section.blocks.append(_everywhere(files, result, references, sites))
    return section


def _references(files: RunFiles, result: Evaluation) -> References:
    """Return the references that were measured on the same split as the federated model."""
    found = files.summary.references if files.summary else None
    if found is None or result.split != "test":
        return References(failed=found.failed if found else {})
    local = {site: each for site, each in found.local_only.items() if each.test and each.test.pooled}
    central = found.centralised
    measured = central if central and central.test and central.test.pooled else None
    return References(local_only=local, centralised=measured, failed=found.failed)


def _chart(files: RunFiles, result: Evaluation, references: References, sites: list[str]) -> Chart:
    metric, groups = files.metric, []
    central = references.centralised.test if references.centralised else None
    for site in sites:
        local = references.local_only.get(site)
        sources = ((FEDERATED, result), (LOCAL, local.test if local else None), (CENTRALISED, central))
        bars = [
            charts.Bar(colour, value, interval_of(evaluation, metric, site))
            for colour, evaluation in sources
            if (value := value_of(evaluation, metric, site)) is not None
        ]
        groups.append((site, bars))
    svg = charts.bars(
        groups,
        metric,
        name="worth",
        title=f"{metric_name(metric)} of each site's own {result.split} rows, by model",
        description="; ".join(
            f"{site}: federated {show(metric, value_of(result, metric, site))}" for site in sites
        ),
    )
    legend = [(variable(FEDERATED), "Federated")]
    legend += [(variable(LOCAL), "Local only")] if references.local_only else []
    legend += [(variable(CENTRALISED), "Centralised (all rows in one place)")] if central else []
    return Chart(svg, legend)


def _table(files: RunFiles, result: Evaluation, references: References, sites: list[str]) -> Table:
    metric, gains = files.metric, local_gains(files)
    central = references.centralised.test if references.centralised else None
    columns = ["Site", f"{result.split.capitalize()} rows", "Federated"]
    columns += ["Local only", "Gain of federating"] if gains else []
    columns += ["Centralised"] if central else []
    rows = []
    for site in [*sites, None]:
        row = [
            Cell(site or "All rows", tone="" if site else "strong"),
            Cell(f"{result.rows.get(site, 0) if site else sum(result.rows.values()):,}"),
            _measured(result, metric, site, "strong"),
        ]
        if gains and site:
            local = references.local_only.get(site)
            row += [_measured(local.test if local else None, metric, site), _gain(files, site)]
        elif gains:
            row += [Cell(figures.DASH, "muted")] * 2
        if central:
            row.append(_measured(central, metric, site))
        rows.append(row)
    hint = "95\u00a0% intervals in small print." if _has_intervals(result, metric) else ""
    return Table(f"{metric_name(metric)} by site and model", columns, rows, hint=hint)


def _has_intervals(result: Evaluation, metric: str) -> bool:
    """Tell whether any figure of `metric` has one; a language model's loss, say, has none."""
    return any(interval_of(result, metric, site) is not None for site in (None, *result.sites))


def _measured(evaluation: Evaluation | None, metric: str, site: str | None, tone: str = "") -> Cell:
    value = value_of(evaluation, metric, site)
    small = show_interval(metric, interval_of(evaluation, metric, site))
    return Cell(show(metric, value), "strong" if tone and value is not None else "", small)


def _gain(files: RunFiles, site: str) -> Cell:
    worth = local_gains(files).get(site)
    if worth is None:
        return Cell(figures.DASH, "muted")
    interval = figures.bounds(worth.interval)
    small = " to ".join(show_gain(worth.metric, bound, unit=False) for bound in interval or ())
    return Cell(show_gain(worth.metric, worth.gain), _TONES[figures.sign(worth.metric, worth.gain)], small)


def _everywhere(files: RunFiles, result: Evaluation, references: References, sites: list[str]) -> Table:
    """Every model on every site's rows: what a site's own adapter is worth to the others."""
    metric = files.metric
    models: list[tuple[str, Evaluation | None]] = [("Federated", result)]
    if references.centralised:
        models.append(("Centralised", references.centralised.test))
    models += [(f"{site} alone", each.test) for site, each in sorted(references.local_only.items())]
    columns = [*sites, None] if len(sites) <= MOST_COLUMNS else [None]
    values = {(name, site): value_of(test, metric, site) for name, test in models for site in columns}
    present = [value for value in values.values() if value is not None]
    low, high = min(present, default=0.0), max(present, default=0.0)
    rows = []
    for name, _ in models:
        row: list[Cell | str] = [name]
        for site in columns:
            value = values[name, site]
            shade = None if value is None or high == low else (value - low) / (high - low)
            row.append(Cell(show(metric, value), "" if site else "strong", shade=shade))
        rows.append(row)
    return Table(
        "Every adapter on everybody's rows",
        ["Model", *(site or "all rows" for site in columns)],
        rows,
        spanner=f"tested on the {result.split} rows of" if len(columns) > 1 else "",
        hint=f"{metric_name(metric)}; the stronger the tint, the better.",
    )
