"""What several commands share: their options, logging, and finding files."""

from __future__ import annotations

import json
import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quorate.deploy.terminal import stderr_console
from quorate.shared.errors import AdapterError, BadInput, ConfigError

if TYPE_CHECKING:
    from quorate.shared.config.run import RunConfig
    from quorate.shared.config.sites import SitesConfig
    from quorate.shared.messages import Split
    from quorate.shared.tasks.base import Row


class LogLevel(StrEnum):
    """How much is said on stderr. Progress is shown at `info` and below."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


LogLevelOption = Annotated[
    LogLevel,
    typer.Option(
        "--log-level",
        help="How much to say on stderr: debug adds tracebacks and other libraries' messages, warning leaves "
        "out progress, error leaves out warnings too.",
        case_sensitive=False,
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print exactly one JSON object on stdout; all else goes to stderr.")
]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run file, or the name of a recipe that comes with Quorate.")
]
SitesOption = Annotated[
    Path | None,
    typer.Option(
        "--sites",
        metavar="SITES",
        help="The sites file: where each site's data lie. NAME.sites.yaml beside NAME.yaml when left out.",
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Overrides of the run file: dotted key, value in YAML, such as training.learning_rate=3e-3.",
    ),
]


def configure_logging(level: LogLevel) -> None:
    """Send log messages to stderr: ours from `level` up, other libraries' from warning up."""
    from rich.logging import RichHandler

    console = stderr_console()
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if console.is_terminal:  # through the console, or messages would break the live bar
        handler = RichHandler(console=console, show_time=False, show_path=False)
    handler.setFormatter(
        logging.Formatter("%(message)s" if console.is_terminal else "%(levelname)s %(name)s: %(message)s")
    )
    chosen = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(
        level=chosen if chosen <= logging.DEBUG else max(chosen, logging.WARNING), handlers=[handler]
    )
    logging.getLogger("quorate").setLevel(chosen)
    # Deprecations inside other libraries are for us, who see them as errors in the tests, not for the user.
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(chosen if chosen <= logging.DEBUG else logging.ERROR)


def find_run(run: str) -> Path:
    """Return the run file that RUN names: a file, else a recipe.

    Raises: ConfigError: there is neither; lists the recipes.
    """
    from quorate.simulations.sites import find_recipe

    path = Path(run)
    if path.exists():
        return path
    if path.suffix in (".yaml", ".yml", ".json") or path.is_absolute():
        raise ConfigError(
            f"{run}: there is no such file; check the path, or name a recipe without its ending."
        )
    return find_recipe(run)


def find_sites(sites: Path | None, run_path: Path) -> Path:
    """Return the sites file: the one named, else the one beside the run file.

    Raises: ConfigError: there is none.
    """
    from quorate.simulations.sites import default_sites_path

    path = sites or default_sites_path(run_path)
    if not path.exists():
        raise ConfigError(
            f"{path}: there is no such file; a simulation needs a sites file, which says where the data of "
            "each site lie: put it there, or name it with --sites."
        )
    return path


def adapter_folder(folder: Path) -> Path:
    """Return the adapter folder that is meant: this one, or the one in a run's output folder.

    Raises: AdapterError: neither is one.
    """
    for candidate in (folder, folder / "adapter"):
        if (candidate / "adapter_config.json").is_file():
            return candidate
    raise AdapterError(
        f"{folder}: holds no adapter (no adapter_config.json); name the adapter folder of a run."
    )


def load_rows(sites: SitesConfig, path: Path, run: RunConfig) -> dict[str, dict[Split, list[Row]]]:
    """Load every site's rows: site -> split -> rows.

    Args:
        sites: content of the sites file.
        path: the sites file, which messages name.
        run: its data alias, task columns and labels.
    Raises: BadInput: as `load_sites`, with the sites file in front.
    """
    from quorate.simulations.sites import load_sites

    try:
        return load_sites(sites, path.parent, run)
    except BadInput as error:
        raise type(error)(f"{path}: {error}") from error


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(json.dumps(content, indent=2) + "\n")
    sys.stdout.flush()
