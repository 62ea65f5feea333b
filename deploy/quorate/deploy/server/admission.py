"""Admitting a site while the server may be running."""

from __future__ import annotations

from pathlib import Path

from quorate.deploy.server import nginx
from quorate.deploy.server.keys import admit
from quorate.deploy.server.paths import ServerPaths
from quorate.deploy.server.start import register_sites
from quorate.server.federation import FederationFolder
from quorate.shared.supervisor import read_status


def admit_site(folder: FederationFolder, site: str, key_file: Path, *, renew: bool = False) -> str:
    """Store the key of a site, and tell a running server; returns one sentence of what was done.

    Raises: ConfigError: the key is none, or another site's, or the site has another and `renew` is not set.
        QuorateError: the running server did not take it.
    """
    new = admit(folder, site, key_file, renew=renew)
    said = f"{site} is admitted" if new else f"{site} was admitted before"
    if not tell_server(folder):
        return f"{said}; it can connect once the server is started."
    return f"{said}; it can connect now."


def tell_server(folder: FederationFolder) -> bool:
    """Have a running server take the keys and certificates as they are now; returns whether one runs.

    Raises: QuorateError: it did not take them.
    """
    paths = ServerPaths(folder)
    if read_status(paths.supervisor) is None:
        return False
    register_sites(paths)
    nginx.reload(paths)  # the server's certificate, the pins, and the list of revoked certificates
    return True
