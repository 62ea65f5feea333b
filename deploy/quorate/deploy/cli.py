"""The command line `quorate`. Nothing heavy is imported here: help must be quick.

Exit codes: 0 done, 1 internal error or a refusal, 2 bad input, 3 quorum not met, 130 interrupted.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import click
import typer

from quorate.deploy.commands.certificates import certificates
from quorate.deploy.commands.compare import compare
from quorate.deploy.commands.data import data
from quorate.deploy.commands.predict import predict
from quorate.deploy.commands.provision import provision
from quorate.deploy.commands.report import report
from quorate.deploy.commands.rerun import rerun
from quorate.deploy.commands.schema import schema
from quorate.deploy.commands.simulate import simulate
from quorate.deploy.commands.site import site
from quorate.deploy.commands.tune import tune
from quorate.deploy.commands.validate import validate
from quorate.deploy.environment import prepare_environment
from quorate.deploy.failures import DONE, INTERRUPTED, report_failure

app = typer.Typer(
    name="quorate",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
for command in (simulate, validate, schema, report, compare, predict, rerun, tune, provision):
    app.command()(command)
app.add_typer(data)
app.add_typer(site)
app.add_typer(certificates)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"quorate {version('quorate')}")
        raise typer.Exit


@app.callback()
def quorate(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Federated LoRA fine-tuning: sites keep their data and decide, no round counts without a quorum.

    Example: quorate simulate demo
    """


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code. Whatever goes wrong ends in one message on stderr.

    Args:
        arguments: without the program's name; those of this process when left out.
    """
    prepare_environment()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a site's name must not fail on an ASCII terminal
    try:
        code = app(args=arguments, prog_name="quorate", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except Exception as error:
        return report_failure(error, show_traceback=logging.getLogger().isEnabledFor(logging.DEBUG))
    if code == INTERRUPTED:  # Typer has turned KeyboardInterrupt into this
        print("interrupted", file=sys.stderr)
    return code if isinstance(code, int) else DONE


def main() -> None:
    """Entry point of the command `quorate`."""
    sys.exit(run())
