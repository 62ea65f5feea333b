"""A federation at the coordinator: `federation.yaml`, and the folder that holds what belongs to it.

NAME/                      made by `quorate provision`, mode 0700
  federation.yaml          names and addresses
  ca/                      ca.crt, ca.key (0600), index.json (every certificate issued or revoked), ca.crl
  server/                  server.crt, server.key (0600), superexec.secret (0600)
  sites/SITE/              node.pub (admitted key), client.crt (mutual TLS), kit.tar
  state/                   what runs: status.json (the supervisor's), superlink.db, superlink/ (its
                           certificate on loopback), nginx/, logs/, bin/, flower/ (FLWR_HOME), nodes.json
  state/runs/RUN_ID/       output folder of each run
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from quorate.shared.config.config_model import NAME, ConfigModel, Name
from quorate.shared.config.read import load_file
from quorate.shared.errors import ConfigError

HOME = "QUORATE_HOME"
"""Environment variable: the folder under which federations lie; ~/.quorate when unset."""
Port = Annotated[int, Field(ge=1, le=65535)]
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


def _host(text: str) -> str:
    """Refuse what can stand in no certificate."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        labels = text.split(".")
        if not all(_LABEL.fullmatch(label) for label in labels) or labels[-1].isdigit():
            raise ValueError("must be a host name or an IP address, without port or scheme") from None
    return text


# A host name or an IP address, and nothing that could break out of a line of nginx's configuration.
Host = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9:][A-Za-z0-9.:-]{0,252}$"), AfterValidator(_host)
]


class ServerConfig(ConfigModel):
    """The coordinator's machine."""

    hostname: Host
    """Name by which sites reach the server; stands in its certificate."""
    addresses: tuple[Host, ...] = ()
    """Further names and IP addresses of the server; they stand in its certificate too."""
    port: Port = 9443
    """Public port: TLS, the paths of SuperNodes alone."""
    listen: Host = "0.0.0.0"
    """Address on which the public port listens."""
    superlink_port: Port = 9091
    """Loopback port of the SuperLink; never reachable from outside."""
    health_port: Port = 9092
    """Loopback port of the SuperLink's gRPC health service."""
    mutual_tls: bool = False
    """Ask every site for a client certificate, bound to its node key, on top of the node key."""

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        if len({self.port, self.superlink_port, self.health_port}) < 3:
            raise ValueError("port, superlink_port and health_port must differ")
        return self


class FederationConfig(ConfigModel):
    """`federation.yaml`: who takes part, and where the server is."""

    name: Name
    """Name of the federation, and of its folder."""
    server: ServerConfig
    """The coordinator's machine."""
    sites: tuple[Name, ...] = Field(min_length=1)
    """Names of the sites; one start-up kit each."""

    @model_validator(mode="after")
    def _sites_differ(self) -> Self:
        # Folders are named after sites, and some file systems do not tell North from north.
        folded = [site.casefold() for site in self.sites]
        if twice := sorted({site for site in self.sites if folded.count(site.casefold()) > 1}):
            raise ValueError(f"site names must differ in more than their case: {', '.join(twice)}")
        return self


@dataclass(frozen=True)
class FederationFolder:
    """Where everything of one federation lies at the coordinator."""

    path: Path

    @classmethod
    def find(cls, name: str) -> FederationFolder:
        """Return the folder that NAME means: a folder with a federation.yaml, else one under QUORATE_HOME.

        Raises: ConfigError: there is none; says what to do.
        """
        direct = Path(name)
        if (direct / "federation.yaml").is_file():
            return cls(direct.resolve())
        folder = home() / name
        if re.fullmatch(NAME, name) and (folder / "federation.yaml").is_file():
            return cls(folder)
        raise ConfigError(
            f"there is no federation {name!r} here or under {home()}; make it with "
            "`quorate provision federation.yaml`, or name its folder."
        )

    @property
    def config(self) -> FederationConfig:
        """The federation's configuration. Raises: ConfigError."""
        return load_file(FederationConfig, self.path / "federation.yaml")

    @property
    def ca(self) -> Path:
        return self.path / "ca"

    @property
    def server(self) -> Path:
        return self.path / "server"

    @property
    def state(self) -> Path:
        return self.path / "state"

    @property
    def runs(self) -> Path:
        return self.state / "runs"

    @property
    def nodes_file(self) -> Path:
        """JSON `quorate.server.federation.nodes.Nodes`, written when a site's key is registered."""
        return self.state / "nodes.json"

    def site(self, name: str) -> Path:
        """What the coordinator holds of one site."""
        return self.path / "sites" / name


def home() -> Path:
    """Return the folder under which federations lie."""
    return Path(os.environ.get(HOME) or "~/.quorate").expanduser()
