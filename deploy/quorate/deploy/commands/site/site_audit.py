"""`quorate site audit`: a site attacks a finished run's result with its own rows."""

from __future__ import annotations

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
from quorate.deploy.commands.both.options import FolderOption, JsonOption, LogLevel, LogLevelOption


def site_audit(
    run_id: Annotated[
        str, typer.Argument(metavar="RUN_ID", help="A run of which this site has received the result.")
    ],
    folder: FolderOption = Path(),
    canaries: CanariesOption = 500,
    reference_pairs: ReferencesOption = 2,
    tokens: TokensOption = 500,
    confidence: ConfidenceOption = 0.999,
    as_json: JsonOption = False,
    log_level: LogLevelOption = LogLevel.info,
) -> None:
    """Attack the adapter of a finished run with this site's own rows; nothing leaves the site.

    Writes audit.json beside the received adapter. Exit code 1 where a claim is refuted.

    Example: quorate site audit 0123456789abcdef --folder ./north
    """
    from quorate.client.audit.result_audit import Options, audit_received

    record = audit_received(folder, run_id, Options(canaries, confidence, reference_pairs, tokens))
    print_audit(record, as_json=as_json)
