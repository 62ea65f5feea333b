"""Certificates of the server and of sites: issued, renewed, signed, revoked, listed."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from quorate.client.node.enrolment import CLIENT_CRT, client_private_bytes, new_key
from quorate.deploy.provision.authority import DAYS, Authority, load_key
from quorate.deploy.provision.certificate_log import Issued
from quorate.deploy.provision.node_keys import (
    check_admissible,
    known_site,
    known_sites,
    on_nist_curve,
    revoke_key,
    stamp,
)
from quorate.server.federation.folder import FederationConfig, FederationFolder
from quorate.shared.errors import ConfigError
from quorate.shared.process.files import PRIVATE, PUBLIC, make_folder, write_atomically

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names under which the server's own processes reach each other."""
_MOST_BYTES = 64 * 2**10


@dataclass(frozen=True)
class Signed:
    """A site's certificate.

    Args:
        path: where it lies; to be sent to the site.
        issued: its entry.
        new: whether this call issued it.
        earlier: certificates of the site that stay valid beside it.
    """

    path: Path
    issued: Issued
    new: bool
    earlier: tuple[Issued, ...] = ()


def server_hosts(config: FederationConfig) -> set[str]:
    """Return the names and addresses that stand in the server's certificate."""
    hosts = (config.server.hostname, *config.server.addresses, *LOOPBACK)
    return {_canonical(host) for host in hosts}


def ensure_server(folder: FederationFolder, authority: Authority, days: int = DAYS) -> list[Path]:
    """Make the server's key and certificate if there are none; returns the files that were written.

    A certificate is issued for a key that has none, and for no other reason.

    Raises: ConfigError: the key is gone, or the CA's is needed and gone.
    """
    key_file, certificate_file = folder.server / "server.key", folder.server / "server.crt"
    written: list[Path] = []
    make_folder(folder.server)
    if not key_file.exists():
        if authority.index.issued("server"):
            raise ConfigError(
                f"{key_file}: is missing; restore it from a copy, or make a new one with `quorate "
                "certificates renew --new-key`.",
                kind="server-key-missing",
            )
        write_atomically(key_file, client_private_bytes(new_key()), PRIVATE)
        written.append(key_file)
    key = load_key(key_file).public_key()
    latest = _latest_of(authority, key)
    if latest is None:
        latest = _issue_server(folder, authority, key, days)
    if not certificate_file.exists() or certificate_file.read_bytes() != latest.pem:
        write_atomically(certificate_file, latest.pem, PUBLIC)
        written.append(certificate_file)
    return written


def renew_server(folder: FederationFolder, authority: Authority, *, new_key_too: bool, days: int) -> Issued:
    """Issue the server a new certificate by the same CA; the old files stay beside the new ones.

    A renewal that was interrupted after its certificate was issued is completed, and none issued again.

    Raises: ConfigError: a key is missing. OutputError.
    """
    key_file, certificate_file = folder.server / "server.key", folder.server / "server.crt"
    make_folder(folder.server)
    present = certificate_file.read_bytes() if certificate_file.exists() else None
    if new_key_too:
        authority.ready()
        if key_file.exists():
            write_atomically(key_file.with_name(f"server.key.old-{stamp()}"), key_file.read_bytes(), PRIVATE)
        write_atomically(key_file, client_private_bytes(new_key()), PRIVATE)
    key = load_key(key_file).public_key()
    latest = _latest_of(authority, key)
    if latest is None or latest.pem == present:
        latest = _issue_server(folder, authority, key, days)
    if present is not None:
        write_atomically(certificate_file.with_name(f"server.crt.old-{stamp()}"), present, PUBLIC)
    write_atomically(certificate_file, latest.pem, PUBLIC)
    return latest


def sign_site(
    folder: FederationFolder,
    authority: Authority,
    site: str,
    request: Path,
    *,
    renew: bool = False,
    days: int = DAYS,
) -> Signed:
    """Sign a site's request for a client certificate. Only name and public key of the request count.

    The same request twice returns the certificate it got.

    Raises: ConfigError: the request is damaged, in another name or with another site's key, the site is
        unknown or revoked, or has a valid certificate and `renew` is not set.
    """
    check_admissible(folder, site)
    key = _read_request(request, site)
    index = authority.index
    for other in index.issued("client"):
        if other.x509.public_key() == key and (other.name != site or other.serial in index.revoked()):
            revoked = other.name == site
            whose = "was revoked" if revoked else f"is that of {other.name}"
            message = f"{request}: its key {whose}; have {site} make a new one: quorate site enrol --renew."
            raise ConfigError(message, kind="request-key-revoked" if revoked else "request-key-of-another")
    valid = index.valid("client", site)
    path = folder.site(site) / CLIENT_CRT
    same = [each for each in valid if each.x509.public_key() == key]
    latest = same[-1] if same else None
    written = path.read_bytes() if path.exists() else None
    if latest is not None and (not renew or latest.pem != written):
        make_folder(folder.path / "sites")
        make_folder(path.parent)
        if latest.pem != written:
            write_atomically(path, latest.pem, PUBLIC)
        return Signed(path, latest, new=False)
    if valid and not renew:
        raise ConfigError(
            f"{site} has a valid certificate already (serial {valid[-1].serial}, until "
            f"{valid[-1].not_after:%Y-%m-%d}); if this request really comes from the site, give --renew.",
            kind="valid-certificate",
        )
    issued = authority.issue("client", site, key, (), days)
    make_folder(folder.path / "sites")
    make_folder(path.parent)
    if written is not None:
        write_atomically(path.with_name(f"{CLIENT_CRT}.old-{stamp()}"), written, PUBLIC)
    write_atomically(path, issued.pem, PUBLIC)
    return Signed(path, issued, new=True, earlier=tuple(valid))


def revoke_site(
    folder: FederationFolder, authority: Authority, site: str, serial: str | None = None
) -> list[Issued]:
    """Put a site out: its node key at once, then all its client certificates. Given again, it completes.

    Args:
        site: the site, which may have gone from federation.yaml already.
        serial: revoke this certificate of the site alone, named by its first digits; the site stays in.

    Returns:
        The certificates that are revoked now.

    Raises: ConfigError: no such site or serial, or the CA's key is needed and missing.
    """
    if site not in known_sites(folder):
        known_site(folder, site)
    certificates = authority.index.issued("client", site)
    if serial is not None:
        digits = serial.replace(":", "").lower().lstrip("0")
        certificates = [each for each in certificates if digits and each.serial.startswith(digits)]
        if len(certificates) != 1:
            raise ConfigError(
                f"{site} has {len(certificates) or 'no'} certificates whose serial begins with {serial!r}; "
                "see `quorate certificates list --json`.",
                kind="no-such-serial",
            )
    else:
        make_folder(folder.path / "sites")
        make_folder(folder.site(site))
        revoke_key(folder, site)
    if certificates:
        authority.revoke([each.serial for each in certificates])
    return certificates


def days_left(issued: Issued) -> int:
    """Return the whole days until a certificate ends; negative after its end."""
    return (issued.not_after - datetime.now(UTC)).days


def _latest_of(authority: Authority, key: ec.EllipticCurvePublicKey) -> Issued | None:
    of_key = [each for each in authority.index.issued("server") if each.x509.public_key() == key]
    return of_key[-1] if of_key else None


def _issue_server(
    folder: FederationFolder, authority: Authority, key: ec.EllipticCurvePublicKey, days: int
) -> Issued:
    config = folder.config
    return authority.issue("server", config.server.hostname, key, sorted(server_hosts(config)), days)


def _read_request(path: Path, site: str) -> ec.EllipticCurvePublicKey:
    """Return the public key of a request that is in the site's name. Raises: ConfigError."""
    remedy = "ask the site for the file client.csr that `quorate site enrol` made"
    try:
        with path.open("rb") as stream:
            content = stream.read(_MOST_BYTES)
        request = x509.load_pem_x509_csr(content)
        names = [each.value for each in request.subject]
        key, sound = request.public_key(), request.is_signature_valid
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; check the path.") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        message = f"{path}: is no certificate request in PEM; {remedy}."
        raise ConfigError(message, kind="no-request") from error
    if not sound:
        message = f"{path}: its signature is wrong, so it was changed on the way; {remedy}."
        raise ConfigError(message, kind="wrong-signature")
    if names != [site] or not request.subject.get_attributes_for_oid(NameOID.COMMON_NAME):
        raise ConfigError(f"{path}: is not a request in the name of {site}; {remedy}.", kind="other-name")
    return on_nist_curve(key, f"{path}: its key is no ECDSA key on a NIST curve; {remedy}.")


def _canonical(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.lower()
