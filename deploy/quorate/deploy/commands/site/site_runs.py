"""`quorate site runs`: what is done, and was done, with a site's data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quorate.deploy.commands.both.options import (
    FolderArgument,
    JsonOption,
    LogLevel,
    LogLevelOption,
    print_json,
)
from quorate.deploy.terminal import print_table
from quorate.shared.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from quorate.client.runs.runs_report import RunAtSite


def site_runs(
    folder: FolderArgument = Path(),
    run_id: Annotated[
        str | None, typer.Option("--run", metavar="RUN_ID", help="Show all that is known of this run.")
    ] = None,
    as_json: JsonOption = False,
    log_level: LogLevelOption = LogLevel.warning,
) -> None:
    """List the runs that asked here, now and past: how far, what left, what was refused, who let it in.

    Example: quorate site runs ./north --run 1f2e3d4c5b6a7988
    """
    from quorate.client.node.folder import SiteFolder
    from quorate.client.runs.runs_report import runs_of

    found = runs_of(SiteFolder.find(folder))
    if run_id is not None:
        known = ", ".join(each.run_id for each in found[:5]) or "none"
        found = [each for each in found if each.run_id == run_id]
        if not found:
            raise ConfigError(f"no run {run_id!r} has asked here ({known}); `quorate site runs` lists them.")
    if as_json:
        print_json({"runs": [each.model_dump(mode="json") for each in found]})
    elif run_id is not None:
        for name, value in _told(found[0]):
            typer.echo(f"{name:12} {value}")
    elif not found:
        typer.echo("no run has asked here yet")
    else:
        _print_table(found)


def _print_table(found: list[RunAtSite]) -> None:
    rows = []
    for each in found:
        state: str = each.state
        if each.refusal is not None and state == "refused":
            state = f"refused: {each.refusal.code}"
        rows.append(
            (
                each.run_id,
                each.name,
                state,
                f"{each.trained}/{each.rounds}",
                "" if each.rows is None else str(each.rows),
                each.data,
                _size(sum(each.left.values())),
                _moment(each.heard),
            )
        )
    print_table(("run", "name", "state", "rounds", "rows", "data", "left", "heard of (UTC)"), rows)


def _told(run: RunAtSite) -> Iterator[tuple[str, str]]:
    """Yield what is known of a run, in words."""
    yield "run", f"{run.run_id} ({run.name}), {run.state}"
    yield "asked by", f"federation {run.federation}, by {run.server}"
    yield "asks for", f"{run.task} on {run.data}, base model {run.model}, privacy {run.privacy or 'none'}"
    if run.claim is not None:
        yield "claim", run.claim
    yield "rounds", f"{run.trained} of {run.rounds} trained here, the newest {run.round}"
    if run.rows is not None:
        yield "rows", f"{run.rows} training rows"
    kinds = ", ".join(f"{kind} {_size(size)}" for kind, size in run.left.items()) or "nothing"
    yield "left", f"{kinds}, in {run.answered} answers"
    yield "refused", f"{run.refused} messages"
    if run.refusal is not None:
        yield "last refusal", f"{run.refusal.code} at {_moment(run.refusal.at)}: {run.refusal.why}"
    if run.approval is not None:
        yield "approved", f"by {run.approval.by} at {_moment(run.approval.at)}"
    if run.withdrawal is not None:
        yield "withdrawn", f"by {run.withdrawal.by} at {_moment(run.withdrawal.at)}"
    if run.in_hand is not None:
        steps = f", step {run.in_hand.step} of {run.in_hand.steps}" if run.in_hand.step else ""
        since = _moment(run.in_hand.since)
        yield "now", f"{run.in_hand.phase} of round {run.in_hand.round} since {since}{steps}"
    yield "worked", f"{run.seconds:.0f} s"
    ended = f", finished {_moment(run.finished)}" if run.finished else ""
    yield "time (UTC)", f"asked first {_moment(run.started)}, last {_moment(run.heard)}{ended}"


def _moment(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S}"


def _size(count: int) -> str:
    if count < 10_000:
        return f"{count} B"
    return f"{count / 1000:.0f} kB" if count < 10**7 else f"{count / 1e6:.0f} MB"
