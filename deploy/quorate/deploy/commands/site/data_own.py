"""`quorate data inspect` in the sites' wheel: the same command on a site's own site.yaml alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from quorate.deploy.commands.both.data_output import tell
from quorate.deploy.commands.both.options import (
    JsonOption,
    LogLevel,
    LogLevelOption,
    OverridesArgument,
    group,
)

own_data = group(
    "data",
    "Look at this site's data before anything is trained.",
    "quorate data inspect run.yaml --site-file site.yaml",
)


@own_data.command("inspect")
def inspect(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The coordinator's run file.")],
    overrides: OverridesArgument = None,
    site_file: Annotated[
        Path, typer.Option("--site-file", metavar="FILE", help="This site's own site.yaml.")
    ] = Path("site.yaml"),
    as_json: JsonOption = False,
    log_level: LogLevelOption = LogLevel.warning,
) -> None:
    """Report on the data of a run: bad rows, duplicates, leakage, labels, lengths. Quotes no row.

    Exit code 0, also with warnings; 2 where a run would refuse the data. Nothing is fetched or trained.

    Example: quorate data inspect run.yaml --site-file site.yaml
    """
    inspect_own(run, overrides or [], site_file, as_json=as_json)


def inspect_own(run_path: Path, overrides: Sequence[str], site_file: Path, *, as_json: bool) -> None:
    """Print the report on what one site holds for a run.

    Raises: ConfigError: a file that is not there or not right. DataError: a run would refuse the data.
    """
    from quorate.client.data.quality_report import inspect_own_data
    from quorate.client.policy.site_config import SiteConfig
    from quorate.shared.config.load import load_run
    from quorate.shared.config.read import load_file

    config = load_run(run_path, overrides)
    tell(inspect_own_data(load_file(SiteConfig, site_file), site_file.parent, config), as_json=as_json)
