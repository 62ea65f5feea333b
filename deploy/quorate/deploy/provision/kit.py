"""A site's start-up kit: `kit.tar`, which unpacks to one folder named after the site.

It holds nothing secret, unless it was made with keys, for a trial. The same content gives the same bytes.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from jinja2 import Environment, PackageLoader, StrictUndefined

from quorate.client.node.enrolment import CLIENT_KEY, CONNECTION, NODE_KEY
from quorate.client.policy.site_config import ConnectionConfig
from quorate.server.federation.folder import FederationConfig
from quorate.shared.config.read import dump_yaml
from quorate.shared.errors import ConfigError
from quorate.shared.process.files import PRIVATE, PUBLIC
from quorate.shared.protocol.versions import QUORATE

KIT = "kit.tar"
CA_CRT = "ca.crt"
_SECRET = (NODE_KEY, CLIENT_KEY)
_TEMPLATES = ("site.yaml", "README.md", "quorate-site.service", "compose.yaml")


def connection_of(config: FederationConfig, site: str) -> ConnectionConfig:
    """Return what a site needs to know of the server."""
    host = config.server.hostname
    address = f"[{host}]" if ":" in host else host
    return ConnectionConfig(
        federation=config.name,
        site=site,
        server=f"{address}:{config.server.port}",
        mutual_tls=config.server.mutual_tls,
    )


def kit_files(
    config: FederationConfig, site: str, ca: x509.Certificate, keys: Mapping[str, bytes]
) -> dict[str, bytes]:
    """Return the files of a kit, by name.

    Args:
        keys: files of a kit with keys, by name; empty for any other.
    """
    connection = connection_of(config, site)
    values = {
        "site": site,
        "federation": config.name,
        "server": connection.server,
        "mutual_tls": config.server.mutual_tls,
        "with_keys": bool(keys),
        "fingerprint": fingerprint(ca),
        "version": QUORATE,
    }
    return {
        CA_CRT: ca.public_bytes(Encoding.PEM),
        CONNECTION: dump_yaml(connection).encode(),
        **{n: _environment().get_template(f"{n}.j2").render(values).encode() for n in _TEMPLATES},
        **keys,
    }


def pack(site: str, files: Mapping[str, bytes], time: int) -> bytes:
    """Return a tar of `files` in the folder `site`: sorted, of no user, all of one time; keys mode 0600.

    Args:
        site: name of the folder.
        files: name (no path) -> content.
        time: seconds since 1970 that every file gets.
    """
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        top = tarfile.TarInfo(site)
        top.type, top.mode, top.mtime = tarfile.DIRTYPE, 0o755, time
        tar.addfile(top)
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(f"{site}/{name}")
            entry.size, entry.mtime = len(content), time
            entry.mode = PRIVATE if name in _SECRET else PUBLIC
            tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def unpack(path: Path, site: str) -> dict[str, bytes]:
    """Return the files of a kit, by name, without writing any. Raises: ConfigError: it is damaged."""
    try:
        with tarfile.open(path, "r:") as tar:
            found = {entry.name: tar.extractfile(entry) for entry in tar if entry.isfile()}
            return {name.removeprefix(f"{site}/"): each.read() for name, each in found.items() if each}
    except (OSError, tarfile.TarError) as error:
        message = f"{path}: is damaged; delete it, and `quorate provision` makes it again."
        raise ConfigError(message) from error


def fingerprint(certificate: x509.Certificate) -> str:
    """Return a certificate's SHA-256 as openssl writes it: AB:CD:..."""
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("quorate.deploy.provision", "templates"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # no HTML; names cannot hold what means something in these files
    )
