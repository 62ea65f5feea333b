"""`quorate simulate`: a whole federation on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quorate.deploy.commands.both.options import (
    JsonOption,
    LogLevel,
    LogLevelOption,
    OverridesArgument,
    RunArgument,
    SitesOption,
    output_option,
    print_json,
)
from quorate.deploy.commands.simulation.inputs import find_run, find_sites, load_rows


def simulate(
    run: RunArgument,
    overrides: OverridesArgument = None,
    sites: SitesOption = None,
    output: Annotated[
        Path | None, output_option("Where to write everything; runs/NAME when left out.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the output folder after its last round.")
    ] = False,
    as_json: JsonOption = False,
    log_level: LogLevelOption = LogLevel.info,
) -> None:
    """Run a federation with every site in this process, and write adapter, record and report.

    Example: quorate simulate medquad training.max_steps=4 -o runs/short
    """
    run_path = find_run(run)
    sites_path = find_sites(sites, run_path)
    from quorate.shared.config.load import load_run, load_sites_file

    config = load_run(run_path, overrides or [])
    sites_config = load_sites_file(sites_path)
    output_dir = output or Path("runs") / config.name
    from quorate.deploy.console import ConsoleTracker
    from quorate.deploy.results import print_results
    from quorate.deploy.terminal import stderr_console, stdout_console
    from quorate.server.tracking.trackers import configured_trackers
    from quorate.simulations.provenance import Origin
    from quorate.simulations.runner import SimulationOptions
    from quorate.simulations.runner import simulate as run_simulation

    rows = load_rows(sites_config, sites_path, config)
    tracker = ConsoleTracker(stderr_console(), quiet=log_level.quiet)
    origin = Origin.of(config, sites_config, sites_path.parent, rows)
    try:
        run_simulation(
            config,
            rows,
            output_dir,
            trackers=[tracker, *configured_trackers(config)],
            on_step=tracker.step,
            options=SimulationOptions(resume, sites_config.samples, origin),
        )
    finally:
        # A run that is interrupted or loses its quorum has a summary too, of the rounds it finished.
        tracker.close()
        if tracker.summary is not None:
            print_results(stderr_console() if as_json else stdout_console(), tracker.summary, output_dir)
            if as_json:
                print_json(tracker.summary.model_dump(mode="json"))
