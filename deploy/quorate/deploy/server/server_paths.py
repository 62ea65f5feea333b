"""Where the running server keeps its files, all under `state/` of the federation's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quorate.server.federation.folder import FederationFolder
from quorate.shared.process.files import make_folder

NGINX, SUPERLINK, SUPEREXEC = "nginx", "superlink", "superexec"
"""Names of the programs, in status and log files."""


@dataclass(frozen=True)
class ServerPaths:
    """Files of the running server."""

    folder: FederationFolder

    @property
    def supervisor(self) -> Path:
        return self.folder.state

    @property
    def logs(self) -> Path:
        return self.folder.state / "logs"

    @property
    def nginx(self) -> Path:
        """nginx.conf, nginx.pid, and folders that nginx asks for."""
        return self.folder.state / "nginx"

    @property
    def flower(self) -> Path:
        """FLWR_HOME of the server's processes and of whoever controls them."""
        return self.folder.state / "flower"

    @property
    def commands(self) -> Path:
        """The only commands that a SuperExec finds on its PATH besides the system's."""
        return self.folder.state / "bin"

    @property
    def database(self) -> Path:
        return self.folder.state / "superlink.db"

    @property
    def loopback_certificate(self) -> Path:
        """What the SuperLink shows on loopback; whoever connects there trusts it and nothing else."""
        return self.folder.state / "superlink" / "loopback.crt"

    @property
    def loopback_key(self) -> Path:
        return self.folder.state / "superlink" / "loopback.key"

    @property
    def secret(self) -> Path:
        """What a SuperExec proves itself with."""
        return self.folder.server / "superexec.secret"

    @property
    def certificate(self) -> Path:
        return self.folder.server / "server.crt"

    @property
    def key(self) -> Path:
        return self.folder.server / "server.key"

    @property
    def ca(self) -> Path:
        return self.folder.ca / "ca.crt"

    @property
    def crl(self) -> Path:
        """Client certificates that were revoked."""
        return self.folder.ca / "ca.crl"

    def make(self) -> None:
        """Make the folders, readable by their owner alone. Raises: OutputError."""
        for path in (
            self.folder.state,
            self.logs,
            self.nginx,
            self.flower,
            self.commands,
            self.loopback_key.parent,
        ):
            make_folder(path)
