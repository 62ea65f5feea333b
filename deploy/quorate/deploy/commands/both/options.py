"""What several commands share: their options, logging, printing for machines, and finding an adapter."""

from __future__ import annotations

import json
import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quorate.deploy.terminal import stderr_console
from quorate.shared.errors import AdapterError
from quorate.shared.process.files import restore_folder

if TYPE_CHECKING:
    from pydantic import BaseModel


class LogLevel(StrEnum):
    """How much is said on stderr. Progress is shown at `info` and below."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"

    @property
    def quiet(self) -> bool:
        """Whether progress is left out."""
        return self in (LogLevel.warning, LogLevel.error)


def _configure_logging(level: LogLevel) -> LogLevel:
    """Send log messages to stderr: ours from `level` up, others' from warning up; returns `level`."""
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
    return level


LogLevelOption = Annotated[
    LogLevel,
    typer.Option(
        "--log-level",
        metavar="LEVEL",
        help="How much to say on stderr, of debug, info, warning and error: debug adds tracebacks and other "
        "libraries' messages, warning leaves out progress, error leaves out warnings too.",
        case_sensitive=False,
        callback=_configure_logging,
    ),
]
"""Configures logging as it is read, before the command begins."""
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print exactly one JSON object on stdout; all else goes to stderr.")
]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run file, or the name of a recipe that comes with Quorate.")
]
FolderArgument = Annotated[
    Path,
    # Readable: no. With two users, either may walk through the folder, and not list it.
    typer.Argument(metavar="[FOLDER]", help="The folder that the start-up kit unpacked to.", readable=False),
]
FolderOption = Annotated[
    Path,
    typer.Option(
        "--folder", metavar="FOLDER", help="The folder that the start-up kit unpacked to.", readable=False
    ),
]
SiteFileOption = Annotated[
    Path | None,
    typer.Option(
        "--site-file", metavar="FILE", help="A site's own site.yaml, instead of a simulation's sites."
    ),
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


def output_option(what: str, metavar: str = "DIR") -> Any:
    """Return the option that says where to write; `what` is its help."""
    return typer.Option("--output", "-o", metavar=metavar, help=what)


def group(name: str, what: str, example: str) -> typer.Typer:
    """Return a command that has others below it; `what` and `example` are its help."""
    return typer.Typer(name=name, no_args_is_help=True, help=f"{what}\n\nExample: {example}")


def print_model(content: BaseModel) -> None:
    """Print a model as one JSON object on stdout, with infinities as the model writes them."""
    print_json(json.loads(content.model_dump_json()))  # model_dump has no say about infinities


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(json.dumps(content, indent=2) + "\n")
    sys.stdout.flush()


def adapter_folder(folder: Path) -> Path:
    """Return the adapter folder that is meant: this one, or the one in a run's output folder.

    Raises: AdapterError: neither is one. OutputError: a kill left it under another name,
        which cannot be changed.
    """
    for candidate in (folder, folder / "adapter"):
        restore_folder(candidate)
        if (candidate / "adapter_config.json").is_file():
            return candidate
    message = f"{folder}: holds no adapter (no adapter_config.json); name the adapter folder of a run."
    raise AdapterError(message)
