"""What the two command lines share: `quorate`, and its smaller sister in the wheel for sites.

Exit codes: 0 done, 1 internal error or a refusal, 2 bad input, 3 quorum not met, 4 diverged,
130 interrupted.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, NoReturn

import click
import typer

from quorate.deploy.environment import prepare_environment
from quorate.deploy.failures import DONE, INTERRUPTED, report_failure
from quorate.shared.errors import BadInput
from quorate.shared.protocol.versions import QUORATE

WHEELS = ("quorate", "quorate-client")
"""Distributions that hold the same files, so that only one of them can be installed."""


def new_app(description: str) -> typer.Typer:
    """Return the program `quorate` without commands.

    Args:
        description: what `quorate --help` says, with an example.
    """
    app = typer.Typer(
        name="quorate",
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    app.callback(help=description)(_quorate)
    return app


def run(app: typer.Typer, arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code. Whatever goes wrong ends in one message on stderr.

    Args:
        app: made by `new_app`, with its commands.
        arguments: without the program's name; those of this process when left out.
    """
    prepare_environment()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a site's name must not fail on an ASCII terminal
    try:
        refuse_both_wheels()
        code = app(args=arguments, prog_name="quorate", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except Exception as error:
        return report_failure(error, show_traceback=logging.getLogger().isEnabledFor(logging.DEBUG))
    if code == INTERRUPTED:  # Typer has turned KeyboardInterrupt into this
        print("interrupted", file=sys.stderr)
    return code if isinstance(code, int) else DONE


def main(app: typer.Typer) -> NoReturn:
    """Run this process's command line to its end, what it printed included."""
    code = run(app)
    try:
        sys.stdout.flush()
    except OSError as error:
        if code == DONE and not isinstance(error, BrokenPipeError):  # whoever read has seen enough
            code = report_failure(error, show_traceback=False)
        # Python would try again as it ends, and make 120 of the exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def refuse_both_wheels() -> None:
    """Refuse to work where both wheels are installed: pip lets the second overwrite the first's files.

    Raises: BadInput: naming both with their versions, and the way out.
    """
    found = {name: released for name in WHEELS if (released := _installed(name)) is not None}
    if len(found) > 1:
        both = " and ".join(f"{name} {released}" for name, released in found.items())
        raise BadInput(
            f"{both} are both installed. They hold the same files, so that removing or upgrading one breaks "
            f"the other: `pip uninstall {' '.join(WHEELS)}`, then install the one you want."
        )


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"quorate {QUORATE}")
        raise typer.Exit


def _quorate(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    pass
