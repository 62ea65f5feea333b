"""The command line `quorate`. Nothing heavy is imported here: help must be quick.

Exit codes: 0 done, 1 internal error or a refusal, 2 bad input, 3 quorum not met, 4 diverged,
130 interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence

from quorate.deploy import program
from quorate.deploy.commands.both.export import export
from quorate.deploy.commands.both.predict import predict
from quorate.deploy.commands.coordinator.certificates import certificates
from quorate.deploy.commands.coordinator.provision import provision
from quorate.deploy.commands.coordinator.run import run as run_command
from quorate.deploy.commands.coordinator.runs import runs
from quorate.deploy.commands.coordinator.server import server
from quorate.deploy.commands.simulation.audit import audit
from quorate.deploy.commands.simulation.compare import compare
from quorate.deploy.commands.simulation.data import data
from quorate.deploy.commands.simulation.forecast import forecast
from quorate.deploy.commands.simulation.report import report
from quorate.deploy.commands.simulation.rerun import rerun
from quorate.deploy.commands.simulation.schema import schema
from quorate.deploy.commands.simulation.simulate import simulate
from quorate.deploy.commands.simulation.tune import tune
from quorate.deploy.commands.simulation.validate import validate
from quorate.deploy.commands.site.site import site

app = program.new_app(
    "Federated LoRA fine-tuning: sites keep their data and decide, no round counts without a quorum.\n\n"
    "Example: quorate simulate demo"
)
for command in (
    simulate,
    validate,
    schema,
    report,
    compare,
    predict,
    rerun,
    audit,
    forecast,
    tune,
    export,
    provision,
    run_command,
):
    app.command()(command)
app.add_typer(runs)
app.add_typer(data)
app.add_typer(server)
app.add_typer(site)
app.add_typer(certificates)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    return program.run(app, arguments)


def main() -> None:
    """Entry point of the command `quorate`."""
    program.main(app)
