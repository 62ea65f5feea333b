"""Which federation a command of the coordinator is about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from quorate.shared.errors import ConfigError

if TYPE_CHECKING:
    from quorate.server.federation.folder import FederationFolder

FederationOption = Annotated[
    str | None,
    typer.Option(
        "--federation",
        metavar="NAME",
        help="The federation: its name, or its folder. May be left out where there is one alone.",
    ),
]


def find_federation(name: str | None) -> FederationFolder:
    """Return the federation's folder: NAME's, else the only one under QUORATE_HOME.

    Raises: ConfigError: there is none, or there are several.
    """
    from quorate.server.federation.folder import FederationFolder, home

    if name is not None:
        return FederationFolder.find(name)
    found = sorted(path.parent for path in home().glob("*/federation.yaml"))
    if len(found) == 1:
        return FederationFolder(found[0])
    if not found:
        raise ConfigError(
            f"there is no federation under {home()}; make one with `quorate provision federation.yaml`, or "
            "name its folder with --federation."
        )
    names = ", ".join(path.name for path in found)
    raise ConfigError(f"there are several federations ({names}); name one with --federation.")
