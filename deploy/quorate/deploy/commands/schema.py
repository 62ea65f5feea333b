"""`quorate schema`: the JSON schema of the files people write, for their editors."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from quorate.deploy.commands.common import print_json


class Kind(StrEnum):
    """The kinds of file."""

    run = "run"
    sites = "sites"


def schema(
    kind: Annotated[Kind, typer.Argument(help="Which kind of file: a run file or a sites file.")] = Kind.run,
) -> None:
    """Print the JSON schema of run files or sites files, so that an editor can complete and check them.

    Example: quorate schema run > run.schema.json
    """
    from quorate.shared.config.load import schema as schema_of

    print_json(schema_of(kind.value))
