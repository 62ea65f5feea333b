"""Prints what `quorate site check` and `quorate site status` found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from quorate.deploy.terminal import print_table

if TYPE_CHECKING:
    from quorate.client.health.site_status import SiteStatus
    from quorate.shared.process.looks import Line
    from quorate.shared.process.supervised import ProgramState


def print_checks(lines: list[Line]) -> None:
    """Print what `site check` found."""
    print_lines(lines)
    wrong = sum(not line.ok for line in lines)
    typer.echo("all is well" if not wrong else f"{wrong} of {len(lines)} checks went wrong")


def print_lines(lines: Sequence[Line]) -> None:
    """Print a table of what was looked at."""
    rows = ((line.what, "ok" if line.ok else "WRONG", Text(line.found, overflow="fold")) for line in lines)
    print_table(("check", "", "found, and what to do"), rows)


def print_programs(programs: Mapping[str, ProgramState]) -> None:
    """Print a table of what a supervisor runs."""
    rows = (
        (
            name,
            "" if program.pid is None else str(program.pid),
            str(program.restarts),
            f"{program.since:%Y-%m-%d %H:%M:%S}",
            program.problem or "works",
        )
        for name, program in programs.items()
    )
    print_table(("program", "process", "restarts", "since (UTC)", "state"), rows)


def print_status(found: SiteStatus) -> None:
    """Print how a site stands."""
    if not found.running:
        typer.echo(f"site {found.site} does not run; start it with `quorate site start`.")
    else:
        print_programs(found.programs)
        detail = f" ({found.server.detail})" if found.server.detail else ""
        since = f" since {found.server.since:%Y-%m-%d %H:%M:%S} UTC" if found.server.since else ""
        typer.echo(f"server {found.server.address}: {found.server.state}{detail}{since}")
        typer.echo(f"base model: {'loaded' if found.base_model_loaded else 'none loaded yet'}")
        if found.site_file is not None:
            typer.echo(f"site.yaml: {found.site_file.said}")
        if found.server.state == "refused":
            typer.echo(
                "The coordinator has not admitted this node key, or has revoked it (`quorate site check` "
                "tells). After a crash it is refused too, which passes within a minute."
            )
    print_lines(found.checks)
    for run_id in found.waiting:
        typer.echo(f"run {run_id} waits for your word: `quorate site approve {run_id}`")
    for run_id in found.withdrawn:
        typer.echo(f"run {run_id}: withdrawn")
