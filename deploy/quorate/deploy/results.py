"""The table at the end of a run: what the federation is worth at each site, and where everything lies."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from quorate.deploy.terminal import print_line
from quorate.server.tracking.records import Evaluation, Measured, Summary
from quorate.shared.privacy.rounding import at_most, delta_shown

_ENDINGS = {
    "done": "done",
    "interrupted": "interrupted; go on with --resume",
    "diverged": "failed, no site can measure the model of its last round",
    "quorum-not-met": "stopped, too few sites; mend them and go on with --resume",
}


def print_results(console: Console, summary: Summary, output_dir: Path) -> None:
    """Print the result of a run.

    Args:
        summary: as written to summary.json, also of a run that was cut short.
    """
    measured, evaluation = _evaluated(summary)
    if measured and evaluation:
        console.print(_table(summary, evaluation))
        kind = (
            "best model by validation"
            if measured == summary.best and not summary.client_privacy
            else "last model"
        )
        print_line(
            console,
            f"{summary.metric} on {evaluation.split} rows, {kind}: after round "
            f"{measured.round} of {summary.rounds}{_interval(summary, evaluation)}",
        )
    else:
        console.print("no round was evaluated, so there is nothing to compare", markup=False)
    for site, rounds in summary.excluded.items():
        reasons = "; ".join(sorted({why.code for why in rounds.values()}))
        listed = ", ".join("joining" if number == 0 else str(number) for number in sorted(rounds))
        print_line(console, f"set aside: {site} in round {listed} ({reasons})")
    for name, why in summary.references.failed.items() if summary.references else ():
        print_line(console, f"no reference: {name}: {why.reason}")
    cost = ""
    if summary.bytes:  # left out where who took part is hidden
        cost = f", {summary.seconds['total']:.0f} s, {decimal(summary.bytes['total'])} sent and received"
    console.print(f"{_ENDINGS[summary.status]}: {summary.rounds} rounds{cost}", markup=False)
    if claim := summary.client_privacy:
        print_line(
            console,
            f"site-level privacy: epsilon {at_most(claim.epsilon)} at delta {delta_shown(claim.delta)}, "
            f"noise on the mean update {claim.noise_on_mean:.3g} times the clipping norm",
        )
    for what, path in (("adapter", output_dir / "adapter"), ("report", output_dir / "report.html")):
        if path.exists():
            print_line(console, f"{what:8} {path}")


def _evaluated(summary: Summary) -> tuple[Measured | None, Evaluation | None]:
    """Return the model to show and its figures: on test rows where there are any, else on validation rows."""
    for measured in (summary.best, summary.final):
        for evaluation in (measured.test, measured.validation) if measured else ():
            if evaluation and evaluation.pooled:
                return measured, evaluation
    return None, None


def _table(summary: Summary, evaluation: Evaluation) -> Table:
    references, metric, split = summary.references, summary.metric, evaluation.split
    local = references.local_only if references and split == "test" else {}
    central = (
        references.centralised.test if references and references.centralised and split == "test" else None
    )
    table = Table("site", box=SIMPLE)
    for name in ("rows", "federated", *["local only"] * bool(local), *["centralised"] * bool(central)):
        table.add_column(name, justify="right")
    for site, figures in evaluation.sites.items():
        row = [_figure(figures, metric)]
        if local:
            own = local[site].test if site in local else None
            row.append(_figure(own.sites.get(site, {}) if own else {}, metric))
        if central:
            row.append(_figure(central.sites.get(site, {}), metric))
        table.add_row(Text(site), str(evaluation.rows.get(site, 0)), *row)
    table.add_section()
    # An adapter of one site alone has no figure for all sites together: there are as many as sites.
    row = [_figure(evaluation.pooled, metric)] + [""] * bool(local)
    row += [_figure(central.pooled, metric)] if central else []
    table.add_row("all sites", str(sum(evaluation.rows.values())), *row)
    return table


def _figure(figures: dict[str, object], metric: str) -> str:
    value = figures.get(metric)
    return f"{value:.3f}" if isinstance(value, float) else "-"


def _interval(summary: Summary, evaluation: Evaluation) -> str:
    bounds = evaluation.intervals.get("pooled", {}).get(summary.metric)
    return f", 95 % interval over all sites {bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else ""
