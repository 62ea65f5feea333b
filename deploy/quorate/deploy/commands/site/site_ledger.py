"""`quorate site ledger`: what this site's data have spent, and whether the record of it holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quorate.deploy.commands.both.options import (
    FolderArgument,
    JsonOption,
    LogLevel,
    LogLevelOption,
    group,
    print_json,
)
from quorate.deploy.terminal import print_table
from quorate.shared.privacy.rounding import at_least, at_most

if TYPE_CHECKING:
    from quorate.client.node.folder import SiteFolder
    from quorate.client.privacy.account_report import Account
    from quorate.client.privacy.ledger_verify import Verdict

ledger = group(
    "ledger", "The privacy ledger: what this site's data have spent.", "quorate site ledger show ./north"
)


@ledger.command("show")
def show(
    folder: FolderArgument = Path(), as_json: JsonOption = False, log_level: LogLevelOption = LogLevel.warning
) -> None:
    """Show by data set what was spent and what is left, and the ledger's newest hash to be noted elsewhere.

    Epsilon is of all entries together, at the budget's delta. Exit code 2 where the ledger does not verify.

    Example: quorate site ledger show ./north
    """
    from quorate.client.privacy.account_report import accounts
    from quorate.client.privacy.budgets import Budgets
    from quorate.client.privacy.ledger import reservations
    from quorate.shared.privacy.accounting import epsilon

    site, verdict = _verified(folder)
    found = accounts(Budgets(site.config, site.path, epsilon), reservations(verdict.rows))
    if as_json:
        listed = [{**each.model_dump(mode="json"), "remaining": each.remaining} for each in found]
        print_json({**_as_json(verdict), "accounts": listed})
    else:
        _print_accounts(found)
        typer.echo(f"{len(verdict.stored)} rows, head {verdict.head}")
    _end(verdict)


@ledger.command("verify")
def verify(
    folder: FolderArgument = Path(),
    head: Annotated[
        str | None,
        typer.Option(
            "--head", metavar="HASH", help="A head that was noted before, or its first 12 digits or more."
        ),
    ] = None,
    as_json: JsonOption = False,
    log_level: LogLevelOption = LogLevel.warning,
) -> None:
    """Check that no row was edited, removed or put back: row by row, and against heads kept elsewhere.

    May be given while the site works. Exit code 0 where all is well, 2 where it is not.

    Example: quorate site ledger verify ./north
    """
    if head is not None and (len(head) < 12 or set(head.lower()) - set("0123456789abcdef")):
        raise typer.BadParameter("give 12 to 64 of the digits 0-9 and a-f that the head begins with.")
    site, verdict = _verified(folder, head)
    if as_json:
        print_json(_as_json(verdict))
    else:
        typer.echo(f"{len(verdict.stored)} rows, {len(verdict.rows)} of them proven, head {verdict.head}")
        if not verdict.findings:
            typer.echo(f"all is well: an unbroken chain, as {site.anchor} has it")
    _end(verdict)


@ledger.command("export")
def export(
    folder: FolderArgument = Path(),
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="A file that is not there yet; else stdout."),
    ] = None,
    log_level: LogLevelOption = LogLevel.warning,
) -> None:
    """Write all rows as JSON, one a line, each with its hash, to be kept or checked by other means.

    Rows that do not verify are written too, and the exit code is then 2.

    Example: quorate site ledger export ./north -o ledger.jsonl
    """
    from quorate.client.privacy.account_report import json_line
    from quorate.shared.errors import OutputError
    from quorate.shared.process.files import write_atomically

    _, verdict = _verified(folder)
    text = "".join(f"{json_line(row)}\n" for row in verdict.stored)
    if output is None:
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        if output.exists():
            raise OutputError(f"{output} is there already; name another file.")
        write_atomically(output, text)
        typer.echo(f"{len(verdict.stored)} rows in {output}, head {verdict.head}")
    _end(verdict)


def _verified(folder: Path, head: str | None = None) -> tuple[SiteFolder, Verdict]:
    from quorate.client.node.folder import SiteFolder
    from quorate.client.privacy.ledger import verify_of

    site = SiteFolder.find(folder)
    return site, verify_of(site, head)


def _as_json(verdict: Verdict) -> dict[str, object]:
    return {
        "ok": not verdict.findings,
        "rows": len(verdict.stored),
        "proven": len(verdict.rows),
        "head": verdict.head,
        "findings": list(verdict.findings),
    }


def _end(verdict: Verdict) -> None:
    """End with exit code 2 where something was found, saying what."""
    for finding in verdict.findings:
        typer.echo(f"WRONG: {finding}", err=True)
    if verdict.findings:
        typer.echo("Do not start the site, change nothing, and read docs/ledger.md.", err=True)
        raise typer.Exit(2)


def _print_accounts(found: list[Account]) -> None:
    if not found:
        typer.echo("no budget, and nothing was spent")
        return
    rows = []
    for each in found:
        spent = "infinite" if each.epsilon is None else at_most(each.epsilon, 4)
        cap, left = (
            ("none", "")
            if each.max_epsilon is None or each.remaining is None
            else (f"{each.max_epsilon:g}", at_least(each.remaining, 4))
        )
        unit = "record" if each.group is None else f"group ({each.group})"
        rows.append((each.data, unit, str(each.entries), spent, f"{each.delta:g}", cap, left))
    print_table(("data", "unit", "entries", "epsilon spent", "at delta", "cap", "remaining"), rows)
