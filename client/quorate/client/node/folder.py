"""Where everything of one site lies.

FOLDER/                 unpacked start-up kit
  site.yaml             the site's own configuration
  connection.yaml       where the server is
  ca.crt                the federation's certificate authority
  node.key, node.pub    identity (`quorate site enrol`)
  client.key, .crt      mutual TLS
  anchor/               heads of the privacy ledger, unless site.yaml names another folder
  state/                site.sock, and what the site process keeps
    ledger/             the privacy ledger
    splits/             what rows are placed by, and which of them private runs were trained on
    bin/                the only commands that Flower finds
    logs/               one file per program
    supervisor/         lock and status
    supernode/          home of the SuperNode: Flower's files, its secret, contact.json, the forwarder
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from quorate.client.node.names import SOCKET
from quorate.client.policy.site_config import ConnectionConfig, SiteConfig, UsersConfig
from quorate.shared.config.read import load_file
from quorate.shared.errors import ConfigError, DataError
from quorate.shared.model.sources import resolve_local

SITE_YAML, CONNECTION_YAML = "site.yaml", "connection.yaml"
NOT_FILES = ("hub", "sklearn", "package")
"""What a source begins with that is not on this machine's disk."""


@dataclass(frozen=True)
class SiteFolder:
    """One site's files. Configuration is read when it is asked for.

    Args:
        path: the folder of the unpacked kit, absolute.
    """

    path: Path

    @classmethod
    def find(cls, path: Path) -> SiteFolder:
        """Return the folder of a site.

        Raises: ConfigError: it holds no connection.yaml.
        """
        if not (path / CONNECTION_YAML).is_file():
            raise ConfigError(
                f"{path.absolute()}: holds no {CONNECTION_YAML}; name the folder that the start-up kit "
                "unpacks to, or change into it."
            )
        return cls(path.resolve())

    @cached_property
    def config(self) -> SiteConfig:
        """site.yaml. Raises: ConfigError."""
        return load_file(SiteConfig, self.path / SITE_YAML)

    @cached_property
    def connection(self) -> ConnectionConfig:
        """connection.yaml. Raises: ConfigError."""
        return load_file(ConnectionConfig, self.path / CONNECTION_YAML)

    @property
    def ca(self) -> Path:
        return self.path / "ca.crt"

    @property
    def node_key(self) -> Path:
        return self.path / "node.key"

    @property
    def client_key(self) -> Path:
        return self.path / "client.key"

    @property
    def client_crt(self) -> Path:
        return self.path / "client.crt"

    @cached_property
    def users(self) -> UsersConfig | None:
        """As whom the programs run; None: as whoever starts them."""
        return self.config.users

    @property
    def state(self) -> Path:
        """What the processes write."""
        return self.path / Path(self.config.state).expanduser()

    @property
    def ledger(self) -> Path:
        return self.state / "ledger"

    @property
    def anchor(self) -> Path:
        """Folder where the privacy ledger's heads are kept."""
        return self.path / Path(self.config.anchor).expanduser()

    @property
    def default_anchor(self) -> bool:
        """Whether that folder is ours to make; one that was chosen may be a disk that is not mounted."""
        return bool(self.config.anchor == SiteConfig.model_fields["anchor"].default)

    @property
    def socket(self) -> Path:
        return socket_of(self.state)

    @property
    def bin(self) -> Path:
        return self.state / "bin"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def supervisor(self) -> Path:
        return self.state / "supervisor"

    @property
    def supernode(self) -> Path:
        return self.state / "supernode"

    @property
    def secret(self) -> Path:
        """What SuperNode and its executor know each other by."""
        return self.supernode / "superexec.secret"

    @property
    def contact(self) -> Path:
        return self.supernode / "contact.json"


def socket_of(state: Path) -> Path:
    """Return where the site process of a STATE listens: there, or where the environment says."""
    return Path(os.environ.get(SOCKET) or state / "site.sock")


def local_data(site: SiteFolder) -> dict[str, Path]:
    """Return where the data on this machine's disk lie, by alias; those that are not there are left out."""
    found = {}
    for alias, source in site.config.data.items():
        if source.source.partition(":")[0] in NOT_FILES:
            continue
        with contextlib.suppress(DataError, ConfigError):  # whoever reads them says what is wrong
            found[alias] = resolve_local(source.source, site.path)
    return found
