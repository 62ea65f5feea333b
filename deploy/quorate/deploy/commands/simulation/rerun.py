"""`quorate rerun`: make a simulated run again from its own folder, and compare the two adapters."""

from __future__ import annotations

import hashlib
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from quorate.deploy.commands.both.options import (
    JsonOption,
    LogLevel,
    LogLevelOption,
    output_option,
    print_json,
)
from quorate.shared.errors import QuorateError

_WEIGHTS = Path("adapter") / "adapter_model.safetensors"


def rerun(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The output folder of a run that `simulate` made.")
    ],
    output: Annotated[
        Path | None, output_option("Where to write the run; DIR-rerun when left out.", "DIR2")
    ] = None,
    as_json: JsonOption = False,
    log_level: LogLevelOption = LogLevel.info,
) -> None:
    """Make a run again from what its folder holds, from any working directory.

    On a CPU, with the same versions and number of threads, the adapter is the same byte for byte; exit code 1
    where it is not. Data that changed since are refused, changed versions are warned of. Under differential
    privacy noise is drawn afresh, so the adapter is another one, and is not compared.

    Example: quorate rerun runs/demo -o runs/demo-again
    """
    output_dir = output or Path(f"{directory if directory.name else directory.resolve()}-rerun")
    from quorate.deploy.console import ConsoleTracker
    from quorate.deploy.results import print_results
    from quorate.deploy.terminal import stderr_console, stdout_console
    from quorate.server.tracking.trackers import configured_trackers
    from quorate.simulations.provenance import reopen
    from quorate.simulations.runner import SimulationOptions, simulate

    config, rows, origin = reopen(directory)
    with closing(ConsoleTracker(stderr_console(), quiet=log_level.quiet)) as tracker:
        summary = simulate(
            config,
            rows,
            output_dir,
            trackers=[tracker, *configured_trackers(config)],
            on_step=tracker.step,
            options=SimulationOptions(origin=origin),
        )
    private = config.privacy is not None
    before, now = None if private else _sha256(directory / _WEIGHTS), _sha256(output_dir / _WEIGHTS)
    if as_json:
        same = None if before is None else before == now
        print_json({"same_adapter": same, "adapter_sha256": now, "summary": summary.model_dump(mode="json")})
    else:
        print_results(stdout_console(), summary, output_dir)
    if before is not None and before != now:
        raise QuorateError(
            f"{output_dir / _WEIGHTS} is not the same as that of {directory}; on a CPU with the same "
            "versions and threads it would be, so look at the warnings above (a GPU, or a run that was cut "
            "short, explains it too)."
        )
    if private:
        typer.echo(
            "differential privacy: noise is drawn afresh in every run, so the adapters differ and are not "
            "compared",
            err=True,
        )
    elif not as_json:
        typer.echo("no adapter to compare with" if before is None else "same adapter, byte for byte")


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
