"""`quorate forecast`: what a run with privacy will cost each site, before any of it is spent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.filesize import decimal

from quorate.deploy.commands.both.options import (
    JsonOption,
    LogLevel,
    LogLevelOption,
    OverridesArgument,
    RunArgument,
    SiteFileOption,
    SitesOption,
    print_model,
)
from quorate.deploy.commands.simulation.inputs import find_run, find_sites, load_rows
from quorate.deploy.commands.site.forecast_own import MeasureOption, forecast_for_own, print_forecast
from quorate.deploy.terminal import print_line, stdout_console, table_of
from quorate.shared.privacy.rounding import at_most, delta_shown

if TYPE_CHECKING:
    from quorate.simulations.central_forecast import ClientForecast, ClientPlanForecast


def forecast(
    run: RunArgument,
    overrides: OverridesArgument = None,
    sites: SitesOption = None,
    site_file: SiteFileOption = None,
    measure: MeasureOption = True,
    as_json: JsonOption = False,
    log_level: LogLevelOption = LogLevel.warning,
) -> None:
    """Say what a run with privacy would cost each site: epsilon, noise, traffic, minutes and memory.

    Shows too what another rank, number of rounds or batch would give. With --site-file the site's own budgets
    and ledger are counted in.

    Example: quorate forecast demo privacy='{unit: record, target_epsilon: 8}'
    """
    run_path = find_run(run)
    if site_file is not None:
        if sites is not None:
            raise typer.BadParameter("--site-file is of one site: leave out --sites.")
        forecast_for_own(run_path, overrides or [], site_file, measure=measure, as_json=as_json)
        return
    sites_path = find_sites(sites, run_path)
    from quorate.client.privacy.forecast import forecast_sites, site_privacy
    from quorate.shared.config.load import load_run, load_sites_file
    from quorate.shared.config.privacy_config import ClientPrivacy

    config = load_run(run_path, overrides or [])
    by_server = isinstance(config.privacy, ClientPrivacy)
    if not by_server:
        site_privacy(config)  # before rows are read
    rows = load_rows(load_sites_file(sites_path), sites_path, config)
    training = {site: splits["train"] for site, splits in rows.items()}
    if by_server:
        from quorate.simulations.central_forecast import forecast_clients

        print_client_forecast(forecast_clients(config, training, measure=measure), as_json=as_json)
        return
    print_forecast(forecast_sites(config, training, measure=measure), as_json=as_json)


def print_client_forecast(found: ClientForecast, *, as_json: bool) -> None:
    """Print it as one JSON object, or as a table of other settings and a few lines."""
    if as_json:
        print_model(found)
        return

    def row(plan: ClientPlanForecast) -> tuple[str, ...]:
        return (
            plan.change,
            at_most(plan.epsilon),
            f"{plan.noise_multiplier:.3g}",
            f"{plan.expected_cohort:g}",
            str(plan.releases),
            f"{plan.noise_on_mean:.3g}",
            decimal(plan.bytes_each_way),
        )

    table = table_of(
        ("", "epsilon", "noise multiplier", "sites in a round", "releases", "noise on mean", "a round"),
        map(row, (found.configured, *found.alternatives)),
        title=f"{found.run}: {found.sites} sites",
    )
    console = stdout_console()
    console.print(table)
    for line in _facts(found):
        print_line(console, f"  {line}")


def _facts(found: ClientForecast) -> list[str]:
    plan = found.configured
    lines = [
        f"delta {delta_shown(found.delta)}; {plan.trained_values:,} numbers are trained, updates clipped to "
        f"norm {found.clipping_norm:g} in round 1"
    ]
    if plan.sampling_probability == 1:
        lines.append("every site takes part in every round")
    else:
        seen = "in secret" if found.participation_hidden else "for all to see"
        lines.append(f"each site is drawn for a round with chance {plan.sampling_probability:.3g}, {seen}")
    if plan.sum_multiplier != plan.noise_multiplier:
        lines.append(
            f"noise multiplier of the sum: {plan.sum_multiplier:.4g}, as adaptive clipping needs noise on a "
            "count too"
        )
    lines.append(
        f"the sites send {decimal(found.bytes_up)} and receive {decimal(found.bytes_down)} in "
        f"{plan.rounds} rounds, all of them together"
    )
    if found.minutes is not None and found.peak_memory_bytes is not None:
        lines.append(
            f"about {found.minutes:.2g} minutes of training of all sites, one by one on {found.device} (an "
            f"estimate); memory: {decimal(found.peak_memory_bytes)} at most"
        )
    lines += [f"{change} cannot be had: {why}" for change, why in found.impossible.items()]
    lines.append(
        "noise on mean: of the mean update, over the clipping norm; above 1 it drowns what sites send"
    )
    if found.warning is not None:
        lines.append(found.warning)
    return lines
