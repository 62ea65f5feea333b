"""`quorate site`: what a site does on its own machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quorate.client.node.names import Half
from quorate.deploy.commands.both.options import (
    FolderArgument,
    FolderOption,
    JsonOption,
    LogLevel,
    LogLevelOption,
    group,
    print_json,
)
from quorate.deploy.commands.site.site_audit import site_audit
from quorate.deploy.commands.site.site_ledger import ledger
from quorate.deploy.commands.site.site_output import print_checks, print_status
from quorate.deploy.commands.site.site_runs import site_runs

if TYPE_CHECKING:
    from quorate.client.node.folder import SiteFolder

site = group("site", "Commands of a site, on its own machine.", "quorate site enrol ./north")
models = group("models", "Base models that this site holds.", "quorate site models import minilm.tar")
site.add_typer(models)
site.add_typer(ledger)
site.command("audit")(site_audit)
site.command("runs")(site_runs)
RunIdArgument = Annotated[
    str, typer.Argument(metavar="RUN_ID", help="The run, as this site's log and `quorate runs list` name it.")
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
    from quorate.client.node.enrolment import enrol as make_keys

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


@site.command("start")
def start(
    folder: FolderArgument = Path(),
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay here until stopped, as systemd and containers want it.")
    ] = False,
    only: Annotated[
        Half | None,
        typer.Option(
            "--only",
            help="Start one half alone, for two units or containers: `site` has the data, `supernode` the "
            "network. With --foreground.",
        ),
    ] = None,
    log_level: LogLevelOption = LogLevel.info,
) -> None:
    """Start the site process and Flower, and keep them running; returns when runs can be answered.

    A server that cannot be reached is tried for ever. Exit code 2 where something is missing.

    Example: quorate site start ./north
    """
    if only is not None:
        from quorate.client.node import split_start

        if not foreground:
            raise typer.BadParameter("--only starts one half for systemd or a container: add --foreground.")
        raise typer.Exit(split_start.run(folder, only))
    from quorate.client.node import site_start as starting

    own = _find(folder)
    if foreground:
        starting.run(own)
    found = starting.start(own)
    name, server = own.connection.site, own.connection.server
    if found is None or found.state == "connected":
        typer.echo(f"site {name} is up, connected to {server}")
    elif found.state == "unreachable":
        typer.echo(f"site {name} is up; {server} is not reached yet ({found.detail}) and is tried for ever")
    else:
        typer.echo(
            f"site {name} is up; {server} refuses it ({found.detail}). After a crash this passes within a "
            "minute; else the coordinator has not admitted this node key. `quorate site status` tells."
        )


@site.command("prepare")
def prepare(folder: FolderArgument = Path(), log_level: LogLevelOption = LogLevel.warning) -> None:
    """Make the folders that this site's programs write to, each for its own user alone. Starts nothing.

    `site start` does this too; systemd's units need it first, as root. May be given again.

    Example: quorate site prepare ./north
    """
    from quorate.client.node.split_start import prepare as make_folders

    own = _find(folder)
    make_folders(own)
    typer.echo(f"{own.state} is ready")


@site.command("stop")
def stop(folder: FolderArgument = Path(), log_level: LogLevelOption = LogLevel.warning) -> None:
    """Stop the site and all that it started. Training ends at its next step; what was answered is kept.

    Example: quorate site stop ./north
    """
    from quorate.shared.process.supervised import stop as stop_supervisor

    own = _find(folder)
    was = stop_supervisor(own.supervisor)
    typer.echo(f"site {own.connection.site} {'has stopped' if was else 'was not running'}")


@site.command("status")
def status(
    folder: FolderArgument = Path(), as_json: JsonOption = False, log_level: LogLevelOption = LogLevel.warning
) -> None:
    """Show programs, connection, disk, certificates, models, data, and runs that wait for you.

    Exit code 1 where all is not well: also where nothing has failed yet, and the next round would.

    Example: quorate site status ./north --json
    """
    from quorate.client.health.site_status import site_status

    found = site_status(_find(folder))
    if as_json:
        print_json({**found.model_dump(mode="json"), "ok": found.ok})
    else:
        print_status(found)
    if not found.ok:
        raise typer.Exit(1)


@site.command("check")
def check(
    folder: FolderArgument = Path(),
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="RUN", help="Hold this run file against policy, labels and models."),
    ] = None,
    as_json: JsonOption = False,
    log_level: LogLevelOption = LogLevel.warning,
) -> None:
    """Check all that this site needs, before it starts: files, keys, data, models, and the way to the server.

    Changes nothing; each line says what to do. Exit code 2 where a file of yours is wrong, 1 where they are
    right and disk, certificates, network or the server are not.

    Example: quorate site check ./north --run run.yaml
    """
    from quorate.client.health.site_check import check as check_all
    from quorate.shared.process.looks import exit_code

    lines = check_all(folder, run)
    code = exit_code(lines)
    if as_json:
        print_json({"ok": not code, "checks": [line.model_dump(mode="json") for line in lines]})
    else:
        print_checks(lines)
    if code:
        raise typer.Exit(code)


@site.command("approve")
def approve(run_id: RunIdArgument, folder: FolderOption = Path()) -> None:
    """Let a run use this site's data, where site.yaml wants a person's word (policy.approve_each_run).

    Read first what it asks: the file is named. The word holds for that configuration alone.

    Example: quorate site approve 1f2e3d4c5b6a7988 --folder ./north
    """
    from quorate.client.policy.approvals import approve as let_in

    configuration = let_in(_find(folder).state, run_id)
    typer.echo(
        f"approved run {run_id}, as {configuration} says. The run asks again by itself; where it waits no "
        "longer, the coordinator goes on with `quorate run --resume`."
    )


@site.command("withdraw")
def withdraw(
    run_id: RunIdArgument,
    folder: FolderOption = Path(),
    undo: Annotated[bool, typer.Option("--undo", help="Take part again.")] = False,
) -> None:
    """Take this site out of a run, also in the middle of it: from now on nothing of it is answered.

    What the site sent before stays with the coordinator.

    Example: quorate site withdraw 1f2e3d4c5b6a7988 --folder ./north
    """
    from quorate.client.policy.approvals import rejoin
    from quorate.client.policy.approvals import withdraw as leave

    own = _find(folder)
    if undo:
        rejoin(own.state, run_id)
        typer.echo(f"site {own.connection.site} takes part in run {run_id} again")
    else:
        leave(own.state, run_id)
        typer.echo(f"site {own.connection.site} answers nothing of run {run_id} any more")


@models.command("import")
def import_model(
    archive: Annotated[
        Path, typer.Argument(metavar="ARCHIVE", help="A tar archive of one model's folder, also compressed.")
    ],
    sha256: Annotated[
        str | None,
        typer.Option("--sha256", metavar="HASH", help="What its weights must hash to, as in the run file."),
    ] = None,
    folder: FolderOption = Path(),
) -> None:
    """Unpack a base model that was delivered as an archive, and say what to add to site.yaml.

    Takes the files that a model is made of; nothing that could run.

    Example: quorate site models import minilm.tar.gz --folder ./north
    """
    from quorate.client.models.base_models import import_archive

    done = import_archive(archive, _find(folder).path / "models", sha256=sha256)
    for name in done.left_out:
        typer.echo(f"left out, no file of a model: {name}", err=True)
    typer.echo(f"{done.folder}\nAdd to site.yaml:\n{done.lines}", nl=False)


def _find(folder: Path) -> SiteFolder:
    from quorate.client.node.folder import SiteFolder

    return SiteFolder.find(folder)
