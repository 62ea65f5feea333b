"""`quorate run`: the run file of a simulation, on the sites of a real federation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quorate.deploy.commands.both.options import (
    JsonOption,
    LogLevel,
    LogLevelOption,
    OverridesArgument,
    RunArgument,
    output_option,
    print_json,
)
from quorate.deploy.commands.coordinator.federation_choice import FederationOption, find_federation
from quorate.deploy.commands.simulation.inputs import find_run

if TYPE_CHECKING:
    from quorate.deploy.control.follower import Follower
    from quorate.deploy.control.run_controller import Controller
    from quorate.deploy.control.run_list import RunFolder
    from quorate.server.tracking.run_status import RunStatus


def run(
    run: RunArgument,
    overrides: OverridesArgument = None,
    federation: FederationOption = None,
    output: Annotated[
        Path | None, output_option("Where the results go at the end; runs/NAME when left out.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the federation's newest run of these settings after its last round."
        ),
    ] = False,
    run_id: Annotated[
        str | None,
        typer.Option("--run-id", metavar="ID", help="Which run to go on with, together with --resume."),
    ] = None,
    max_restarts: Annotated[
        int,
        typer.Option(
            "--max-restarts",
            metavar="N",
            min=0,
            help="How often a run that was lost (a killed process, a machine that restarted) is submitted "
            "again in a row without a finished round between.",
        ),
    ] = 5,
    as_json: JsonOption = False,
    log_level: LogLevelOption = LogLevel.info,
) -> None:
    """Run a federation on its sites, with the very run file of a simulation, and fetch the results.

    Needs `quorate server start` here and `quorate site start` at the sites. Ctrl-C stops the run at its last
    finished round; --resume goes on.

    Example: quorate run medquad --federation heart -o runs/medquad
    """
    from quorate.deploy.control import run_outputs
    from quorate.deploy.control.flower_cli import Flower
    from quorate.deploy.control.follower import Follower
    from quorate.deploy.control.run_controller import Controller
    from quorate.deploy.terminal import stderr_console
    from quorate.server.rounds.run import locked_output
    from quorate.shared.config.load import load_run
    from quorate.shared.errors import ConfigError

    if run_id is not None and not resume:
        raise ConfigError("--run-id names a run to go on with; give it together with --resume.")
    folder = find_federation(federation)
    config = load_run(find_run(run), overrides or [])
    config = run_outputs.pinned(config)
    output_dir = output or Path("runs") / config.name
    run_outputs.check_output(output_dir, config, resume=resume)
    run_outputs.check_room_for(folder, output_dir)
    with locked_output(output_dir):  # one command per output folder, and so per run
        target = (
            run_outputs.old_run(folder, config, output_dir, run_id)
            if resume
            else run_outputs.new_run(folder, config, output_dir)
        )
        follower = Follower(stderr_console(), quiet=log_level.quiet, output_dir=output_dir)
        controller = Controller(
            target, Flower.of(folder), on_event=follower, say=follower.say, max_restarts=max_restarts
        )
        follower.say(f"run {target.run_id}")
        try:
            ended = _carry_out(controller, target, follower, federation or str(folder.path))
        finally:
            follower.close()
            if not controller.submitted:
                run_outputs.forget(target)
        run_outputs.fetch_results(target, output_dir)
    _print(target, ended, output_dir, as_json=as_json)
    if ended.exit_code:
        sys.stderr.write(f"{_words(ended)}\n")
        raise typer.Exit(ended.exit_code)


def _carry_out(controller: Controller, run: RunFolder, follower: Follower, federation: str) -> RunStatus:
    """Return how the run ended; a Ctrl-C stops it, a second one leaves it alone."""
    try:
        return controller.carry_out()
    except KeyboardInterrupt:
        if not controller.submitted:
            raise
        follower.close()
        attach = f"`quorate runs logs {run.run_id} -f --federation {federation}`"
        follower.say(f"stopping the run (Ctrl-C again lets it go on without you; watch it with {attach})")
        try:
            ended = controller.stop()
        except KeyboardInterrupt:
            follower.say(f"the run goes on; watch it with {attach}, or stop it with `quorate runs stop`")
            raise
        if ended is None:
            follower.say(f"the run takes its time to end; watch it with {attach}")
            raise
        return ended


def _print(run: RunFolder, ended: RunStatus, output_dir: Path, *, as_json: bool) -> None:
    from quorate.deploy.results import print_results
    from quorate.deploy.terminal import stderr_console, stdout_console
    from quorate.server.results.outputs import read_summary
    from quorate.server.rounds.run import SUMMARY_FILE

    if ended.state == "failed" or not (run.path / SUMMARY_FILE).is_file():
        return
    summary = read_summary(run.path)
    print_results(stderr_console() if as_json else stdout_console(), summary, output_dir)
    if as_json:
        print_json(summary.model_dump(mode="json"))


def _words(ended: RunStatus) -> str:
    """Return what the command line says of an end, as a simulation's would."""
    if ended.state == "interrupted":
        return "interrupted"
    errors = {"quorum-not-met": "QuorumNotMet: ", "diverged": "ModelDiverged: "}
    return errors.get(ended.state, "") + ended.message
