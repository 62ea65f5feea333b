"""The command line of the wheel `quorate-client`: what a site needs, and nothing of the coordinator.

The list is written out, here as in `cli.py`: a command whose package is missing is a mistake to be seen, not
one to be skipped.
"""

from __future__ import annotations

from collections.abc import Sequence

from quorate.deploy import program
from quorate.deploy.commands.both.export import export
from quorate.deploy.commands.both.predict import predict
from quorate.deploy.commands.site.data_own import own_data
from quorate.deploy.commands.site.forecast_own import forecast
from quorate.deploy.commands.site.site import site

app = program.new_app(
    "A site of a federation: it keeps its data and decides what they are used for.\n\n"
    "Example: quorate site enrol ./north"
)
for command in (predict, export, forecast):
    app.command()(command)
app.add_typer(own_data)
app.add_typer(site)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    return program.run(app, arguments)


def main() -> None:
    """Entry point of the command `quorate` of the sites' wheel."""
    program.main(app)
