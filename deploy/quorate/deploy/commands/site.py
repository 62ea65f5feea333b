"""`quorate site`: what a site does on its own machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

site = typer.Typer(
    name="site",
    no_args_is_help=True,
    help="Commands of a site, on its own machine.\n\nExample: quorate site enrol ./north",
)
FolderArgument = Annotated[
    Path, typer.Argument(metavar="[FOLDER]", help="The folder that the start-up kit unpacked to.")
]


@site.command("enrol")
def enrol(
    folder: FolderArgument = Path(),
    renew: Annotated[
        bool, typer.Option("--renew", help="Make new keys; the old ones are kept beside them.")
    ] = False,
) -> None:
    """Make this site's keys, and say what to send to the coordinator. Private keys stay here.

    Keys that are there already are never touched without --renew, so this may be given again.

    Example: quorate site enrol ./north
    """
    from quorate.client.enrol import enrol as make_keys

    done = make_keys(folder, renew=renew)
    who = f"site {done.connection.site} of federation {done.connection.federation}"
    typer.echo(f"{who}: " + (f"made {', '.join(done.made)}" if done.made else "has its keys already"))
    for path in done.kept_aside:
        typer.echo(f"kept aside: {path}")
    typer.echo("Send to the coordinator (public, but over a channel where nobody can swap them):")
    for path in done.send:
        typer.echo(f"  {path}")
    if done.kept_aside:
        typer.echo("Until the coordinator has admitted the new key, this site cannot connect.")
