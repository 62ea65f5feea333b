"""The command line `quorate`. Nothing heavy is imported here: help must be quick.

Exit codes: 0 done, 1 internal error or a refusal, 2 bad input, 3 quorum not met, 4 diverged,
130 interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence

from quorate.deploy import program
from quorate.deploy.commands.audit import audit
from quorate.deploy.commands.certificates import certificates
from quorate.deploy.commands.compare import compare
from quorate.deploy.commands.data import data
from quorate.deploy.commands.export import export
from quorate.deploy.commands.forecast import forecast
from quorate.deploy.commands.predict import predict
from quorate.deploy.commands.provision import provision
from quorate.deploy.commands.report import report
from quorate.deploy.commands.rerun import rerun
from quorate.deploy.commands.run import run as run_command
from quorate.deploy.commands.runs import runs
from quorate.deploy.commands.schema import schema
from quorate.deploy.commands.server import server
from quorate.deploy.commands.simulate import simulate
from quorate.deploy.commands.site import site
from quorate.deploy.commands.tune import tune
from quorate.deploy.commands.validate import validate

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
    """Run one command line; returns the exit code.

    Args:
        arguments: without the program's name; those of this process when left out.
    """
    return program.run(app, arguments)


def main() -> None:
    """Entry point of the command `quorate`."""
    program.main(app)
