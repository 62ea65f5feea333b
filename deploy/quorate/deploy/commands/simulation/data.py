"""`quorate data inspect`: what a site should know of its own data before anything is trained."""

from __future__ import annotations

from typing import Annotated

import typer

from quorate.deploy.commands.both.data_output import tell
from quorate.deploy.commands.both.options import (
    JsonOption,
    LogLevel,
    LogLevelOption,
    OverridesArgument,
    RunArgument,
    SiteFileOption,
    SitesOption,
    group,
)
from quorate.deploy.commands.simulation.inputs import find_run, find_sites
from quorate.deploy.commands.site.data_own import inspect_own

data = group("data", "Look at a site's data before anything is trained.", "quorate data inspect demo")


@data.command("inspect")
def inspect(
    run: RunArgument,
    overrides: OverridesArgument = None,
    sites: SitesOption = None,
    site: Annotated[
        str | None, typer.Option("--site", metavar="NAME", help="Look at this site alone; all of them else.")
    ] = None,
    site_file: SiteFileOption = None,
    as_json: JsonOption = False,
    log_level: LogLevelOption = LogLevel.warning,
) -> None:
    """Report on the data of a run: bad rows, duplicates, leakage, labels, lengths. Quotes no row.

    Exit code 0, also with warnings; 2 where a run would refuse the data. Nothing is fetched or trained.

    Example: quorate data inspect heart --site Budapest
    """
    run_path = find_run(run)
    if site_file is not None:
        if sites is not None or site is not None:
            raise typer.BadParameter("--site-file is of one site: leave out --sites and --site.")
        inspect_own(run_path, overrides or [], site_file, as_json=as_json)
        return
    sites_path = find_sites(sites, run_path)
    from quorate.shared.config.load import load_run, load_sites_file
    from quorate.simulations.sites_quality import inspect_data

    config = load_run(run_path, overrides or [])
    tell(inspect_data(load_sites_file(sites_path), sites_path.parent, config, site), as_json=as_json)
