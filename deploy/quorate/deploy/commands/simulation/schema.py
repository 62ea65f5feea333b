"""`quorate schema`: the JSON schema of the files people write, for their editors."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from quorate.deploy.commands.both.options import print_json

if TYPE_CHECKING:
    from quorate.shared.config.config_model import ConfigModel


class Kind(StrEnum):
    """The kinds of file."""

    run = "run"
    sites = "sites"
    federation = "federation"
    site = "site"


def schema(
    kind: Annotated[
        Kind,
        typer.Argument(
            metavar="[KIND]",
            help="Which kind of file: run (a run file), sites (a simulation's sites), federation (a "
            "coordinator's) or site (a site's own).",
        ),
    ] = Kind.run,
) -> None:
    """Print the JSON schema of a kind of file, so that an editor can complete and check it.

    Example: quorate schema run > run.schema.json
    """
    from quorate.shared.config.load import schema as schema_of

    print_json(schema_of(_model(kind), kind.value))


def _model(kind: Kind) -> type[ConfigModel]:
    match kind:
        case Kind.federation:
            from quorate.server.federation.folder import FederationConfig

            return FederationConfig
        case Kind.site:
            from quorate.client.policy.site_config import SiteConfig

            return SiteConfig
        case Kind.sites:
            from quorate.shared.config.sites_config import SitesConfig

            return SitesConfig
        case Kind.run:
            from quorate.shared.config.run_config import RunConfig

            return RunConfig
