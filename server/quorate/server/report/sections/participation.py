"""Who was asked, who counted with what weight, who was set aside and why."""

from __future__ import annotations

from collections.abc import Mapping

from quorate.server.report.drawing import charts
from quorate.server.report.drawing.svg import BAD, FEDERATED, GRID, variable
from quorate.server.report.figures import DASH, count, show_bytes, spans
from quorate.server.report.page import Cell, Chart, Section, Table
from quorate.server.report.run_files import RunFiles
from quorate.server.tracking.records import Exclusion, SolvedHead

MOST_SITES, MOST_ROUNDS = 40, 120
"""A larger chart of participation cannot be read."""


def participation_section(files: RunFiles) -> Section:
    """Say who took part in which round."""
    section = Section("sites", "Who took part")
    records = files.records
    excluded = exclusions(files)
    federation = files.config.federation
    if not records:
        section.say("No round was finished.")
    elif files.config.hides_participation:
        section.say(
            "Who took part in which round is hidden (privacy.participation_hidden), and so left out here. "
            f"A round needs {count(federation.quorum, 'good update')} of those drawn (the quorum)."
        )
        if excluded:
            section.blocks.append(_exclusions(excluded))
        return section
    else:
        asked = sum(len(record.cohort) for record in records)
        counted = sum(len(record.weights) for record in records)
        section.say(
            f"In {count(len(records), 'round')} sites were asked {count(asked, 'time')} to train; "
            f"{counted:,} of the answers counted. "
            f"A round needs {count(federation.quorum, 'good update')} (the quorum)."
        )
        if asked:  # where sites are drawn by coins, no coin may ever have come up
            section.blocks.append(_chart(files))
        section.blocks.append(_table(files))
    if records and records[0].head is not None:
        section.say(_head(records[0].head))
    if excluded:
        section.blocks.append(_exclusions(excluded))
    elif records:
        section.say("No answer was set aside: every site that was asked counted.")
    if records:
        section.blocks.append(_weights(files))
    return section


def _head(head: SolvedHead) -> str:
    """Say from whose rows the head of round 1 was solved."""
    without = "".join(f", without {site} ({why.reason})" for site, why in head.excluded.items())
    rows = count(sum(head.rows.values()), "training row")
    return (
        f"Before round 1 the head was solved from sums over {rows} of {count(len(head.rows), 'site')}"
        f"{without}: "
        f"{show_bytes(sum(head.bytes_up.values()))} came, and the ridge's strength is {head.strength:g}."
    )


def exclusions(files: RunFiles) -> dict[str, dict[int, Exclusion]]:
    """Return site -> round (0 while joining) -> why it was set aside."""
    found: dict[str, dict[int, Exclusion]] = {}
    if files.summary:
        found = {site: dict(rounds) for site, rounds in files.summary.excluded.items()}
    for record in files.records:
        for site, why in record.excluded.items():
            found.setdefault(site, {})[record.round] = why
    return found


def _chart(files: RunFiles) -> Chart:
    records = files.records[-MOST_ROUNDS:]
    everyone = sorted({site for record in records for site in (*record.cohort, *record.excluded)})
    aside = {(site, record.round) for record in records for site in record.excluded}
    # Where there are too many, those with something to see.
    sites = sorted(everyone, key=lambda site: -sum(site == each for each, _ in aside))[:MOST_SITES]
    grid = charts.Grid(
        sites=sorted(sites),
        rounds=[record.round for record in records],
        weights={(site, r.round): weight for r in records for site, weight in r.weights.items()},
        aside=frozenset(aside),
    )
    legend = [(variable(FEDERATED), "counted (the stronger, the more weight)")]
    legend += [(variable(BAD), "\N{MULTIPLICATION SIGN} set aside")] if aside else []
    if any(set(everyone) - set(record.cohort) for record in records):
        legend.append((variable(GRID), "not asked"))
    cut = []
    if len(sites) < len(everyone):
        cut.append(f"{len(sites)} of {len(everyone)} sites, those set aside most often first")
    if len(records) < len(files.records):
        cut.append(f"the last {len(records)} of {len(files.records)} rounds")
    title = "Sites by round" + (f" ({'; '.join(cut)})" if cut else "")
    svg = charts.participation(
        grid,
        name="participation",
        title="Which site counted in which round",
        description="; ".join(
            f"{site}: counted in {count(sum(site in r.weights for r in records), 'round')}"
            for site in grid.sites
        ),
    )
    return Chart(svg, legend, title=title)


def _table(files: RunFiles) -> Table:
    rows = []
    for site in files.sites:
        asked = [record for record in files.records if site in record.cohort]
        counted = [record for record in files.records if site in record.weights]
        aside = [record for record in files.records if site in record.excluded]
        norms = [r.update_norms[site] for r in counted if site in r.update_norms]
        share = sum(record.weights[site] for record in counted) / len(counted) if counted else None
        rows.append(
            [
                Cell(site),
                Cell(f"{len(asked)}"),
                Cell(f"{len(counted)}", "bad" if asked and not counted else ""),
                Cell(f"{len(aside)}", "bad" if aside else "muted"),
                Cell(f"{max(r.num_examples.get(site, 0) for r in counted):,}" if counted else DASH),
                Cell(f"{sum(r.num_steps.get(site, 0) for r in counted):,}"),
                Cell(f"{100 * share:.1f}\u00a0%" if share is not None else DASH),
                Cell(f"{sum(norms) / len(norms):.3g}" if norms else DASH),
            ]
        )
    columns = [
        "Site",
        "Asked",
        "Counted",
        "Set aside",
        "Training rows",
        "Steps",
        "Mean weight",
        "Mean change",
    ]
    hint = "In rounds. Mean change: how far its update moved the adapter (L2 norm), a round."
    return Table("How often each site took part", columns, rows, hint=hint)


def _exclusions(excluded: Mapping[str, Mapping[int, Exclusion]]) -> Table:
    rows = []
    for site in sorted(excluded):
        reasons: dict[tuple[str, str], list[int]] = {}
        for round, why in excluded[site].items():
            reasons.setdefault((why.reason, why.code), []).append(round)
        for (reason, code), rounds in reasons.items():
            when = ["joining"] if 0 in rounds else []
            when += [spans([r for r in rounds if r])] if any(rounds) else []
            rows.append([Cell(site), Cell(", ".join(when)), Cell(reason), Cell(code, "muted")])
    return Table("Set aside, and why", ["Site", "Round", "Reason", "Code"], rows, words=(1, 2, 3))


def _weights(files: RunFiles) -> Table:
    sites = sorted({site for record in files.records for site in record.weights})
    title = "Weight of each site in each round"
    if len(sites) > 12:
        rows = [
            [
                Cell(f"{record.round}"),
                Cell(", ".join(f"{site} {100 * w:.1f}\u00a0%" for site, w in sorted(record.weights.items()))),
            ]
            for record in files.records
        ]
        return Table(title, ["Round", "Weights"], rows, folded=True, words=(1,))
    rows = [
        [
            Cell(f"{r.round}"),
            *(
                Cell(f"{100 * r.weights[s]:.1f}\u00a0%") if s in r.weights else Cell(DASH, "muted")
                for s in sites
            ),
        ]
        for r in files.records
    ]
    return Table(title, ["Round", *sites], rows, folded=True)
