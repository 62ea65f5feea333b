"""`quorate forecast`: what a run with privacy will cost each site, before any of it is spent."""

from __future__ import annotations

import typer

from quorate.deploy.commands.both.options import (
    JsonOption,
    LogLevel,
    LogLevelOption,
    OverridesArgument,
    RunArgument,
    SiteFileOption,
    SitesOption,
    configure_logging,
)
from quorate.deploy.commands.simulation.inputs import find_run, find_sites, load_rows
from quorate.deploy.commands.site.forecast_own import MeasureOption, forecast_for_own, print_forecast


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
    configure_logging(log_level)
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
        from quorate.deploy.commands.simulation.forecast_output import print_client_forecast
        from quorate.simulations.central_forecast import forecast_clients

        print_client_forecast(forecast_clients(config, training, measure=measure), as_json=as_json)
        return
    print_forecast(forecast_sites(config, training, measure=measure), as_json=as_json)
