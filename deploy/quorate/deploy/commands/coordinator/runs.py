"""`quorate runs`: the runs of a federation, looked at and stopped from the coordinator's machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from quorate.deploy.commands.both.options import JsonOption, LogLevel, LogLevelOption, group, print_json
from quorate.deploy.commands.coordinator.federation_choice import FederationOption, find_federation
from quorate.deploy.terminal import print_table, stdout_console
from quorate.shared.errors import ConfigError

if TYPE_CHECKING:
    from quorate.deploy.control.run_list import RunFolder

runs = group("runs", "The runs of a federation.", "quorate runs list --federation heart")
IdArgument = Annotated[
    str, typer.Argument(metavar="ID", help="Id of the run, or the beginning of it that no other run has.")
]


@runs.command("list")
def list_(
    federation: FederationOption = None,
    as_json: JsonOption = False,
    log_level: LogLevelOption = LogLevel.warning,
) -> None:
    """List the runs, the newest first. `lost` runs were killed and go on with `quorate run --resume`.

    A run that goes on although the command that started it is gone is said to be `alone`.

    Example: quorate runs list --federation heart
    """
    from quorate.deploy.control.run_list import list_runs

    found = [_described(each) for each in list_runs(find_federation(federation))]
    if as_json:
        print_json({"runs": found})
        return
    if not found:
        typer.echo("no runs yet; start one with `quorate run`")
        return
    rows = []
    for each in found:
        rounds = f"{each['round']}/{each['rounds']}"
        state = f"{each['state']}, alone" if each["command"] == "gone" else each["state"]
        started, heard = (moment[:19].replace("T", " ") for moment in (each["started"], each["heard"] or ""))
        rows.append((each["id"], each["name"], state, rounds, started, heard))
    print_table(("id", "name", "state", "rounds", "started (UTC)", "heard of (UTC)"), rows)
    if any(each["command"] == "gone" for each in found):
        typer.echo(
            "alone: no command follows the run, and it would not be submitted again; follow it with `quorate "
            "run --resume`, or stop it with `quorate runs stop`"
        )


@runs.command("show")
def show(
    run_id: IdArgument,
    federation: FederationOption = None,
    as_json: JsonOption = False,
    log_level: LogLevelOption = LogLevel.warning,
) -> None:
    """Show how a run stands, and its results once there are some.

    Example: quorate runs show 3f2a --federation heart
    """
    from pathlib import Path

    from quorate.deploy.control.run_list import Submission, find_run_folder
    from quorate.deploy.results import print_results
    from quorate.server.results.outputs import read_summary
    from quorate.server.rounds.run import SUMMARY_FILE
    from quorate.server.tracking.run_status import RunStatus

    run = find_run_folder(find_federation(federation), run_id)
    status, submission = RunStatus.read(run.path), Submission.read(run.path)
    summary = read_summary(run.path) if (run.path / SUMMARY_FILE).is_file() else None
    described = {
        **_described(run),
        "message": status.message if status else "",
        "folder": str(run.path),
        "output": submission.output_dir if submission else None,
        "submissions": list(submission.flower_runs) if submission else [],
    }
    if as_json:
        print_json({**described, "summary": summary.model_dump(mode="json") if summary else None})
        return
    for name, value in described.items():
        if value not in ("", None):
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            stdout_console().print(f"{name:12} {text}", markup=False, soft_wrap=True)
    if summary is not None:
        print_results(stdout_console(), summary, Path(submission.output_dir) if submission else run.path)


@runs.command("logs")
def logs(
    run_id: IdArgument,
    follow: Annotated[
        bool,
        typer.Option("--follow", "-f", help="Go on until the run ends, or Ctrl-C; the run is not touched."),
    ] = False,
    federation: FederationOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the events as they are written: one JSON object a line.")
    ] = False,
    log_level: LogLevelOption = LogLevel.info,
) -> None:
    """Show the progress of a run from its beginning, as the command that started it showed it.

    Example: quorate runs logs 3f2a -f --federation heart
    """
    from quorate.deploy.control.follower import Follower
    from quorate.deploy.control.run_list import find_run_folder
    from quorate.server.tracking.events import EVENTS_FILE
    from quorate.server.tracking.events import follow as follow_events

    run = find_run_folder(find_federation(federation), run_id)
    follower = Follower(stdout_console())
    over = False
    try:
        for event in follow_events(run.path / EVENTS_FILE):
            if event is not None:
                typer.echo(event.model_dump_json()) if as_json else follower(event)
            elif over or not follow:
                break
            else:
                # Once more after the end was seen: its last events may have come between.
                over = run.state not in ("running", "waiting")
    finally:
        follower.close()


@runs.command("stop")
def stop(
    run_id: IdArgument,
    federation: FederationOption = None,
    as_json: JsonOption = False,
    log_level: LogLevelOption = LogLevel.warning,
) -> None:
    """Stop a run at its last finished round; `quorate run --resume` goes on with it.

    Example: quorate runs stop 3f2a --federation heart
    """
    from quorate.deploy.control.flower_cli import Flower
    from quorate.deploy.control.run_controller import Controller
    from quorate.deploy.control.run_list import find_run_folder

    folder = find_federation(federation)
    run = find_run_folder(folder, run_id)
    if run.flower_run is None or run.state not in ("running", "waiting", "lost"):
        raise ConfigError(f"run {run.run_id} does not run ({run.state}); there is nothing to stop.")
    controller = Controller(
        run, Flower.of(folder), on_event=lambda _event: None, say=typer.echo, max_restarts=0
    )
    ended = controller.stop()
    state = ended.state if ended else "stopping"
    if as_json:
        print_json({"id": run.run_id, "state": state, "round": run.rounds_done})
    else:
        typer.echo(f"run {run.run_id}: {state} after round {run.rounds_done}")


def _described(run: RunFolder) -> dict[str, Any]:
    """Return what `list` and `show` say of a run."""
    config, command, heard = run.config, None, run.heard
    if run.state in ("running", "waiting"):
        command = {True: "follows", False: "gone", None: "unknown"}[run.followed]
    return {
        "id": run.run_id,
        "name": config.name,
        "state": run.state,
        "round": run.rounds_done,
        "rounds": config.federation.rounds,
        "started": run.started.isoformat(),
        "heard": heard.isoformat() if heard else None,
        "command": command,
    }
