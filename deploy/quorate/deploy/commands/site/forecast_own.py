"""`quorate forecast` in the sites' wheel, on a site's own site.yaml alone; and printing what was forecast."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from quorate.deploy.commands.both.options import (
    JsonOption,
    LogLevel,
    LogLevelOption,
    OverridesArgument,
    print_model,
)
from quorate.deploy.terminal import print_line, stdout_console, table_of
from quorate.shared.privacy.rounding import at_most, delta_shown

if TYPE_CHECKING:
    from quorate.client.privacy.forecast import RunForecast, SiteForecast
    from quorate.shared.privacy.run_cost import Plan

MeasureOption = Annotated[
    bool,
    typer.Option(
        "--measure/--no-measure",
        help="Take a few private steps at each site, thrown away afterwards, to estimate minutes and memory.",
    ),
]


def forecast(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The coordinator's run file.")],
    overrides: OverridesArgument = None,
    site_file: Annotated[
        Path, typer.Option("--site-file", metavar="FILE", help="This site's own site.yaml.")
    ] = Path("site.yaml"),
    measure: MeasureOption = True,
    as_json: JsonOption = False,
    log_level: LogLevelOption = LogLevel.warning,
) -> None:
    """Say what a run with privacy would cost this site: epsilon, noise, traffic, minutes and memory.

    Nothing leaves the site.

    Example: quorate forecast run.yaml --site-file site.yaml
    """
    forecast_for_own(run, overrides or [], site_file, measure=measure, as_json=as_json)


def forecast_for_own(
    run_path: Path, overrides: Sequence[str], site_file: Path, *, measure: bool, as_json: bool
) -> None:
    """Print the forecast for one site.

    Raises: as `forecast_own`.
    """
    from quorate.client.policy.site_config import SiteConfig
    from quorate.client.privacy.forecast import forecast_own
    from quorate.shared.config.load import load_run
    from quorate.shared.config.read import load_file

    config = load_run(run_path, overrides)
    site = load_file(SiteConfig, site_file)
    print_forecast(forecast_own(site, site_file.parent, config, measure=measure), as_json=as_json)


def print_forecast(found: RunForecast, *, as_json: bool) -> None:
    """Print a forecast as one JSON object, or as a table of sites and one of other settings for each."""
    if as_json:
        print_model(found)
        return
    console = stdout_console()
    for site in found.sites:
        console.print(_settings(site))
        for line in _facts(site):
            print_line(console, f"  {line}")
        if site.budgets:
            console.print("  epsilon of what the ledger has and this run, composed:", highlight=False)
            console.print(_spending(site))
        if site.refusal is not None:
            print_line(console, f"  this site would refuse the run: {site.refusal}")
    counted = any(site.ledger for site in found.sites)
    before = "" if counted else ": what earlier runs on the same rows spent comes on top"
    print_line(
        console, f"largest epsilon of a site: {at_most(found.largest_epsilon)}, for this run alone{before}"
    )
    if found.peak_memory_bytes is not None:
        most = decimal(found.peak_memory_bytes)
        print_line(console, f"memory: {most} at most, with one site at a time on {found.device}")


def _settings(site: SiteForecast) -> Table:
    def row(plan: Plan) -> tuple[str, ...]:
        return (
            plan.change,
            at_most(plan.epsilon_pld),
            f"{plan.noise_multiplier:.3g}",
            f"{plan.sampling_probability:.3g}",
            str(plan.steps),
            f"{plan.relative_noise:.3g}",
            decimal(plan.bytes_each_way),
        )

    return table_of(
        ("", "epsilon", "noise multiplier", "chance in a step", "steps", "relative noise", "a round"),
        map(row, (site.privacy.configured, *site.privacy.alternatives)),
        title=f"{site.site}: {site.privacy.units} {site.unit}s",
    )


def _facts(site: SiteForecast) -> list[str]:
    plan = site.privacy.configured
    lines = [
        f"delta {delta_shown(site.privacy.delta)}; epsilon by Renyi divergence {at_most(plan.epsilon_rdp)}; "
        f"{plan.trained_values:,} numbers are trained, clipped to norm {site.clipping_norm:g}",
        f"sends {decimal(site.bytes_up)} and receives {decimal(site.bytes_down)} in {plan.rounds} rounds",
    ]
    if site.minutes is not None:
        lines.append(f"about {site.minutes:.2g} minutes of training on this machine, by itself (an estimate)")
    return lines


def _spending(site: SiteForecast) -> Table:
    """Return what the ledger would have, with the run and with its neighbours, as a table."""
    table = table_of((), ())
    table.add_column("")
    for budget in site.budgets:
        unit = "record" if budget.group is None else f"group ({budget.group})"
        table.add_column(Text(f"data.{budget.data} by {unit}"), justify="right")
    table.add_column("")

    def add(what: str, figures: Iterable[str], note: str = "") -> None:
        table.add_row(what, *figures, note)

    add("rounds in the ledger", (str(each.entries) for each in site.budgets))
    add("spent so far", (at_most(each.spent, 4) for each in site.budgets))
    refused = "refused" if site.refusal else ""
    add(site.privacy.configured.change, (at_most(each.after, 4) for each in site.budgets), refused)
    for plan in site.privacy.alternatives:
        refused = "refused" if plan.change in site.refused else ""
        add(plan.change, (at_most(each.alternatives[plan.change], 4) for each in site.budgets), refused)
    add("cap", ("none" if each.max_epsilon is None else f"{each.max_epsilon:g}" for each in site.budgets))
    add("at delta", (f"{each.delta:g}" for each in site.budgets))
    return table
