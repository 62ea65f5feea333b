"""`quorate export`: base model and adapter merged into one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quorate.deploy.commands.both.options import (
    JsonOption,
    LogLevel,
    LogLevelOption,
    adapter_folder,
    output_option,
    print_json,
)
from quorate.shared.errors import ConfigError


def export(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The output folder of a run, or an adapter folder.")
    ],
    output: Annotated[
        Path | None, output_option("A new folder for the model; DIR-merged when left out.", "FOLDER")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Add the adapter to the weights of its base model, in float32.")
    ] = False,
    require_audit: Annotated[
        bool,
        typer.Option(
            "--require-audit",
            help="Refuse unless `quorate audit` attacked this very adapter and refuted no claim.",
        ),
    ] = False,
    as_json: JsonOption = False,
    log_level: LogLevelOption = LogLevel.warning,
) -> None:
    """Write a run's model as one folder that transformers loads without PEFT.

    The base model must be the very one that the run used, which its hash proves.

    Example: quorate export runs/demo --merge -o models/demo
    """
    if not merge:
        message = f"say --merge: the adapter alone lies in {directory} already, in the form that PEFT reads."
        raise ConfigError(message)
    adapter = adapter_folder(directory)
    if require_audit:
        from quorate.client.audit.result_audit import check_audited

        check_audited(adapter)
    from quorate.client.models.merge import merge as merge_model

    folder = output or Path(f"{directory if directory.name else directory.resolve()}-merged")
    sha256 = merge_model(adapter, folder)
    if as_json:
        print_json({"model": str(folder), "sha256": sha256, "adapter": str(adapter)})
    else:
        typer.echo(f"{folder}\nsha256 {sha256}")
