"""Prints the report on a site's data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from quorate.deploy.commands.both.options import print_json
from quorate.deploy.terminal import stdout_console, table_of
from quorate.shared.errors import DataError

if TYPE_CHECKING:
    from quorate.client.data.quality import SiteReport, SourceReport
    from quorate.client.data.quality_report import DataReport

_MOST_COLUMNS = 12


def tell(report: DataReport, *, as_json: bool) -> None:
    """Print a report for people or for machines.

    Raises: DataError: a run would refuse the data.
    """
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        _print(report)
    if not report.ok:
        raise DataError(f"a run would refuse these data: {'; '.join(report.errors)}")


def _print(report: DataReport) -> None:
    for source in report.sources:
        _print_source(source)
    for each in report.sites:
        _print_site(each)
    for note in report.notes:
        typer.echo(f"note: {note}")
    warnings = sum(finding.level == "warning" for each in report.sites for finding in each.findings)
    typer.echo(f"{len(report.errors)} errors, {warnings} warnings")


def _print_source(source: SourceReport) -> None:
    rows = ", ".join(f"{split} {count}" for split, count in source.rows.items())
    typer.echo(f"{source.name}: {rows} rows read, {source.unusable} of them cannot be used")
    for problem in source.problems:
        typer.echo(f"  error: {problem}")
    if source.unusable > len(source.problems):
        typer.echo(f"  error: and {source.unusable - len(source.problems)} more such rows")
    gaps = {name: column for name, column in source.columns.items() if column.missing or column.placeholders}
    for name, column in list(gaps.items())[:_MOST_COLUMNS]:
        said = f", {column.placeholders} that say so in words" if column.placeholders else ""
        typer.echo(f"  column {name}: {column.missing} rows without a value{said}")
    if len(gaps) > _MOST_COLUMNS:
        typer.echo(f"  and {len(gaps) - _MOST_COLUMNS} more columns with gaps (--json lists them)")


def _print_site(site: SiteReport) -> None:
    splits = list(site.splits.values())
    values: dict[str, list[Any]] = {
        "rows": [each.rows for each in splits],
        "repeat an earlier row": [each.duplicates for each in splits],
        "nearly repeat one": [each.near_duplicates for each in splits],
    }
    for label in dict.fromkeys(label for each in splits for label in each.labels):
        values[f"label {label}"] = [each.labels.get(label) for each in splits]
    for fact in dict.fromkeys(fact for each in splits for fact in each.facts):
        for name in dict.fromkeys(name for each in splits for name in each.facts.get(fact, {})):
            shown = [each.facts.get(fact, {}).get(name) for each in splits]
            values[f"{fact}: {name.replace('_', ' ')}"] = shown
    rows = [[name, *map(_cell, each)] for name, each in values.items()]
    stdout_console().print(table_of(("", *site.splits), rows, title=site.name))
    for finding in site.findings:
        where = f" ({', '.join(finding.rows)})" if finding.rows else ""
        typer.echo(f"  {finding.level}: {finding.text}{where}")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
