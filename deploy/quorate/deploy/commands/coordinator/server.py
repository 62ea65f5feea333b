"""`quorate server`: the coordinator's side of a federation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quorate.deploy.commands.both.options import JsonOption, LogLevel, LogLevelOption, group, print_json
from quorate.deploy.commands.coordinator.federation_choice import FederationOption, find_federation
from quorate.deploy.commands.site.site_output import print_lines, print_programs
from quorate.deploy.terminal import print_table

if TYPE_CHECKING:
    from quorate.deploy.server.server_status import ServerStatus

server = group(
    "server",
    "The coordinator's side of a federation: start it, look at it, stop it, admit sites.",
    "quorate server start --federation heart",
)


@server.command("start")
def start(
    federation: FederationOption = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay here until stopped, as systemd and containers want it.")
    ] = False,
    log_level: LogLevelOption = LogLevel.info,
) -> None:
    """Start nginx, SuperLink and SuperExec, and keep them running; returns when sites can connect.

    Exit code 2 where something is missing, expired or taken; it says what to do.

    Example: quorate server start --federation heart
    """
    from quorate.deploy.server.server_start import run
    from quorate.deploy.server.server_start import start as start_in_background

    folder = find_federation(federation)
    if foreground:
        run(folder)
        return
    start_in_background(folder)
    settings = folder.config.server
    typer.echo(
        f"the server of {folder.config.name} is up: sites connect to {settings.hostname}:{settings.port}"
    )


@server.command("status")
def status(
    federation: FederationOption = None,
    as_json: JsonOption = False,
    log_level: LogLevelOption = LogLevel.warning,
) -> None:
    """Show programs, certificates, sites and disk, each asked anew. Exit code 1 where all is not well.

    That is also where nothing has failed yet, and the next round would: a certificate with few days left, a
    disk that is nearly full, a site that is not connected. Sites that were revoked are shown, and count not.

    Example: quorate server status --federation heart --json
    """
    from quorate.deploy.server.server_status import server_status

    found = server_status(find_federation(federation))
    if as_json:
        print_json({**found.model_dump(mode="json"), "ok": found.ok})
    else:
        _print(found)
    if not found.ok:
        raise typer.Exit(1)


@server.command("stop")
def stop(federation: FederationOption = None, log_level: LogLevelOption = LogLevel.warning) -> None:
    """Stop the server and all that it started. A run that was going on continues with `quorate run --resume`.

    Example: quorate server stop --federation heart
    """
    from quorate.deploy.server.server_start import stop as stop_server

    folder = find_federation(federation)
    was = stop_server(folder)
    typer.echo(f"the server of {folder.config.name} {'has stopped' if was else 'was not running'}")


@server.command("admit")
def admit(
    site: Annotated[str, typer.Argument(metavar="SITE", help="Name of the site, as in federation.yaml.")],
    key: Annotated[
        Path, typer.Argument(metavar="NODE.PUB", help="The public key that the site sent (node.pub).")
    ],
    federation: FederationOption = None,
    renew: Annotated[
        bool,
        typer.Option("--renew", help="Replace the key that the site had; the old one is kept beside it."),
    ] = False,
    log_level: LogLevelOption = LogLevel.info,
) -> None:
    """Let a site connect: store the public key that `quorate site enrol` made there.

    Make sure, by telephone say, that the key came from that site: who holds its private half is the site.

    Example: quorate server admit north north/node.pub --federation heart
    """
    from quorate.deploy.server.server_start import admit_site

    folder = find_federation(federation)
    typer.echo(admit_site(folder, site, key, renew=renew))


def _print(found: ServerStatus) -> None:
    if not found.running:
        typer.echo(f"the server of {found.federation} does not run; start it with `quorate server start`.")
    else:
        print_programs(found.programs)
    certificates = (
        (name, f"{days:.0f} days" if days >= 0 else "EXPIRED") for name, days in found.certificates.items()
    )
    print_table(("certificate", "good for"), certificates)
    sites = []
    for name, site in found.sites.items():
        since = f" {site.revoked:%Y-%m-%d %H:%M} UTC" if site.revoked else ""
        sites.append((name, site.node_id or "", f"{site.state}{since}"))
    print_table(("site", "node", "state"), sites)
    print_lines(found.checks)
