"""`quorate compare`: runs of one run file with different seeds, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quorate.deploy.commands.both.options import JsonOption, LogLevel, LogLevelOption, print_json


def compare(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Output folders of runs that differ in their seed.")
    ],
    as_json: JsonOption = False,
    log_level: LogLevelOption = LogLevel.warning,
) -> None:
    """Print mean test figures over seeds, with 95 % intervals, as tables in Markdown.

    Example: quorate compare runs/medquad-0 runs/medquad-1 runs/medquad-2
    """
    from quorate.server.results import compare_seeds as seeds

    comparison = seeds.compare(directories)
    if as_json:
        print_json(comparison.model_dump(mode="json"))
    else:
        typer.echo(seeds.markdown(comparison))
