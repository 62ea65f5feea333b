"""Whether a site's keys and certificates are what they should be, and for how long."""

from __future__ import annotations

import stat
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

from quorate.client.node.folder import SiteFolder
from quorate.shared.errors import ConfigError
from quorate.shared.process.looks import check_days

RENEW_SERVER = "have the coordinator give `quorate certificates renew`"


def node_key(site: SiteFolder) -> str:
    """Look at the node key. Raises: ConfigError: it is missing, none, or others may read it."""
    again = f"`quorate site enrol {site.path}`"
    if not site.node_key.is_file():
        raise ConfigError(f"{site.node_key} is missing; make it with {again}.")
    mode = stat.S_IMODE(site.node_key.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(
            f"{site.node_key}: others may read it (mode {mode:03o}); give `chmod 600 {site.node_key}`, and "
            f"make a new one with {again} --renew if anybody did."
        )
    try:
        load_ssh_private_key(site.node_key.read_bytes(), None)
    except ValueError as error:
        raise ConfigError(f"{site.node_key}: is no private key; make one with {again}.") from error
    return "private to its owner"


def authority(site: SiteFolder) -> str:
    """Look at the certificate of the federation's authority. Raises: ConfigError, NotReady."""
    return _certificate(site.ca, "ask the coordinator for a new start-up kit")


def client_certificate(site: SiteFolder) -> str:
    """Look at the certificate of mutual TLS. Raises: ConfigError, NotReady."""
    from quorate.client.node.tls_forwarder import NEEDED
    from quorate.shared.process.loopback import find_nginx

    sign = f"`quorate certificates sign {site.connection.site} client.csr --renew`"
    found = _certificate(
        site.client_crt, f"have the coordinator give {sign}, and put the client.crt that comes back here"
    )
    certificate = x509.load_pem_x509_certificate(site.client_crt.read_bytes())
    key = load_pem_private_key(site.client_key.read_bytes(), None)
    if certificate.public_key() != key.public_key():
        raise ConfigError(
            f"{site.client_crt}: belongs to another key than {site.client_key}; send client.csr to the "
            "coordinator again."
        )
    # The server answers a certificate that comes with another site's node key with 403, for ever.
    about, names = site.connection, _names(certificate)
    if f"quorate:{about.federation}/{about.site}" not in names:
        raise ConfigError(
            f"{site.client_crt}: is that of {' '.join(names) or 'nobody'}, and the server takes the node key "
            f"of {about.site} with this site's own certificate alone; put the client.crt and client.key of "
            "this site here, or send client.csr to the coordinator again."
        )
    find_nginx(NEEDED)
    return found


def _certificate(path: Path, remedy: str) -> str:
    if not path.is_file():
        raise ConfigError(f"{path} is missing; {remedy}.")
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path}: is no certificate; {remedy}.") from error
    return check_days(str(path), certificate.not_valid_before_utc, certificate.not_valid_after_utc, remedy)


def _names(certificate: x509.Certificate) -> list[str]:
    """Return what the federation's authority calls the holder: quorate:FEDERATION/SITE."""
    try:
        alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return alternative.value.get_values_for_type(x509.UniformResourceIdentifier)
