"""`quorate report`: render the report of a finished, interrupted or copied run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quorate.deploy.commands.both.options import LogLevel, LogLevelOption
from quorate.shared.errors import OutputError


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The output folder of a run.")],
    log_level: LogLevelOption = LogLevel.warning,
) -> None:
    """Write report.html of a run again from the files in its output folder, and print where it lies.

    Example: quorate report runs/demo
    """
    if not (directory / "run.yaml").is_file():
        raise OutputError(f"{directory}: holds no run (no run.yaml); name the output folder of a run.")
    from quorate.server.report import write_report

    typer.echo(write_report(directory))
