"""Admitting a site while the server may be running."""

from __future__ import annotations

from pathlib import Path

from quorate.deploy.server import nginx
from quorate.deploy.server.keys import admit
from quorate.deploy.server.paths import ServerPaths
from quorate.deploy.server.start import register_sites
from quorate.server.federation import FederationFolder
from quorate.shared.supervisor import read_status


def admit_site(folder: FederationFolder, site: str, key_file: Path) -> str:
    """Store the key of a site, and tell a running server; returns one sentence of what was done.

    Raises: ConfigError: the key is none, or another site's, or the site has another. QuorateError: the
        running server did not take it.
    """
    new = admit(folder, site, key_file)
    paths = ServerPaths(folder)
    said = f"{site} is admitted" if new else f"{site} was admitted before"
    if read_status(paths.supervisor) is None:
        return f"{said}; it can connect once the server is started."
    register_sites(paths)
    if folder.config.server.mutual_tls:
        nginx.reload(paths)  # its pins
    return f"{said}; it can connect now."
