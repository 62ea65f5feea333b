"""`quorate audit`: attack a run's own result, and hold what that gives against what was claimed."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from quorate.deploy.commands.both.audit_output import (
    CanariesOption,
    ConfidenceOption,
    ReferencesOption,
    TokensOption,
    print_audit,
)
from quorate.deploy.commands.both.options import JsonOption, LogLevel, LogLevelOption


def audit(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The output folder of a run that `simulate` made.")
    ],
    site: Annotated[
        str | None,
        typer.Option("--site", metavar="NAME", help="Attack this site's rows; all sites' when left out."),
    ] = None,
    canaries: CanariesOption = 500,
    reference_pairs: ReferencesOption = 2,
    tokens: TokensOption = 500,
    confidence: ConfidenceOption = 0.999,
    as_json: JsonOption = False,
    log_level: LogLevelOption = LogLevel.info,
) -> None:
    """Attack a run's result: who was in it, and does its private training do what it claims?

    Trains each site again with canaries beside its rows (or the run again, with canary sites), and reference
    adapters for a membership attack; looks for words of the rows in an update. Writes audit.json, and the
    report again. Exit code 1 where a claim is refuted. An audit proves no claim:
    it finds what is broken.

    Example: quorate audit runs/demo
    """
    from quorate.client.audit.result_audit import Options
    from quorate.deploy.console import ConsoleTracker
    from quorate.deploy.terminal import stderr_console
    from quorate.simulations.simulated_audit import audit as audit_folder

    options = Options(canaries, confidence, reference_pairs, tokens)
    with closing(ConsoleTracker(stderr_console(), quiet=log_level.quiet)) as tracker:
        record = audit_folder(directory, options, site=site, on_step=tracker.step)
    print_audit(record, as_json=as_json)
