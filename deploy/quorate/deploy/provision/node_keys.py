"""Node keys at the coordinator: which one a site may connect with.

sites/SITE/node.pub            the admitted key; no such file: the site cannot connect
sites/SITE/node.pub.old-TIME   keys that were replaced
sites/SITE/revoked             JSON `Revocation`: the site is out, and its keys never come back
sites/SITE/revoked.until-TIME  an earlier revocation, after the site was taken back with a new key
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import AwareDatetime, ValidationError

from quorate.client.node.enrolment import NODE_PUB, node_public_bytes
from quorate.server.federation.folder import FederationFolder
from quorate.shared.config.config_model import ConfigModel
from quorate.shared.errors import ConfigError
from quorate.shared.process.files import PUBLIC, locked, make_folder, put_aside, write_atomically

REVOKED = "revoked"
_MOST_BYTES = 16 * 2**10
_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
"""The NIST curves that OpenSSH's format has, all of which Flower takes."""


class Revocation(ConfigModel):
    """Content of the marker `revoked`."""

    time: AwareDatetime
    node_keys: tuple[str, ...] = ()
    """SHA-256 of the public keys it had, which are never admitted again."""


def admit_key(folder: FederationFolder, site: str, pub: Path, *, renew: bool = False) -> Path:
    """Admit a site's node key: from then on, whoever holds its private half may connect as that site.

    The same key twice changes nothing.

    Args:
        site: name of the site, which must stand in federation.yaml.
        pub: the file `node.pub` that the site sent.
        renew: replace a key that was admitted before; the old file is kept beside the new one.

    Returns:
        The admitted key's file, one line in OpenSSH format.

    Raises: ConfigError: the file is no ECDSA public key on a NIST curve, or belongs to another site, or the
        site is unknown or revoked, or has another key. OutputError: the folder cannot be written.
    """
    try:
        with pub.open("rb") as stream:
            content = stream.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{pub}: cannot be read: {error.strerror}; check the path.") from error
    with locked(folder.path):
        return admit(folder, site, content, str(pub), renew=renew)


def admit(folder: FederationFolder, site: str, content: bytes, where: str, *, renew: bool = False) -> Path:
    """Admit a node key given as bytes; `admit_key` says the rest. The caller holds the folder (`locked`)."""
    check_admissible(folder, site)
    key = read_public_key(content, where)
    fingerprint = fingerprint_of(key)
    for other in known_sites(folder):
        owned = _stored_key(folder, other)
        if other != site and owned is not None and fingerprint_of(owned) == fingerprint:
            message = f"{where}: this is the key of {other}; every site makes its own: ask {site} for its."
            raise ConfigError(message, kind="key-of-another")
        if any(fingerprint in each.node_keys for each in _revocations(folder, other)):
            raise ConfigError(
                f"{where}: this key of {other} was revoked; have the site make a new one (quorate site enrol "
                "--renew).",
                kind="key-revoked",
            )
    path = folder.site(site) / NODE_PUB
    present = admitted_key(folder, site)
    if present is not None and fingerprint_of(present) == fingerprint:
        return path
    if present is not None and not renew:
        raise ConfigError(
            f"{where}: {site} has another key already; if the site renewed its key, and you are sure that "
            "this one comes from it, give --renew.",
            kind="another-key-already",
        )
    make_folder(folder.path / "sites")
    make_folder(path.parent)
    if present is not None:  # a copy, so that a kill in between leaves the site with the key it had
        write_atomically(path.with_name(f"{NODE_PUB}.old-{stamp()}"), path.read_bytes(), PUBLIC)
    write_atomically(path, node_public_bytes(key, site), PUBLIC)
    return path


def read_public_key(content: bytes, where: str) -> ec.EllipticCurvePublicKey:
    """Read a node's public key. Raises: ConfigError: it is something else; says what."""
    if b"PRIVATE KEY" in content:
        raise ConfigError(
            f"{where}: this is a private key, which must never leave the site: delete this copy, and have "
            "the site make a new one (quorate site enrol --renew).",
            kind="private-key",
        )
    remedy = "ask the site for the file node.pub that `quorate site enrol` made"
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"{where}: too large for a public key; {remedy}.")
    try:
        key = pem.load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        message = f"{where}: is no public key in OpenSSH format; {remedy}."
        raise ConfigError(message, kind="no-public-key") from error
    return on_nist_curve(key, f"{where}: is no ECDSA key on a NIST curve; {remedy}.")


def on_nist_curve(key: object, otherwise: str) -> ec.EllipticCurvePublicKey:
    """Return a public key of the kind that Flower takes.

    Raises: ConfigError: it is of another kind; with the words `otherwise`.
    """
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVES):
        raise ConfigError(otherwise, kind="no-nist-curve")
    return key


def fingerprint_of(key: ec.EllipticCurvePublicKey) -> str:
    """Return the SHA-256 of a public key, in hex."""
    der = key.public_bytes(pem.Encoding.DER, pem.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def admitted_key(folder: FederationFolder, site: str) -> ec.EllipticCurvePublicKey | None:
    """Return the node key a site may connect with; None if it may not. Raises: ConfigError: damaged."""
    return None if revocation(folder, site) else _stored_key(folder, site)


def _stored_key(folder: FederationFolder, site: str) -> ec.EllipticCurvePublicKey | None:
    path = folder.site(site) / NODE_PUB
    if not path.exists():
        return None
    return read_public_key(path.read_bytes(), str(path))


def revocation(folder: FederationFolder, site: str) -> Revocation | None:
    """Return the revocation of a site that is out. Raises: ConfigError: the marker is damaged."""
    return _read(folder.site(site) / REVOKED)


def revoke_key(folder: FederationFolder, site: str) -> None:
    """Put a site out: mark it, then take its admitted key away. Given again, it completes what is missing.

    The caller holds the folder (`locked`). Raises: ConfigError, OutputError.
    """
    marker, path = folder.site(site) / REVOKED, folder.site(site) / NODE_PUB
    found, key = revocation(folder, site), _stored_key(folder, site)
    keys = set(found.node_keys if found else ()) | ({fingerprint_of(key)} if key else set())
    if found is None or keys != set(found.node_keys):
        since = found.time if found else datetime.now(UTC)
        content = Revocation(time=since, node_keys=tuple(sorted(keys))).model_dump_json(indent=1) + "\n"
        write_atomically(marker, content.encode(), PUBLIC)
    if key is not None:  # after the marker, which remembers the key
        put_aside(path, f"{NODE_PUB}.old-{stamp()}")


def restore_site(folder: FederationFolder, site: str) -> None:
    """Let a revoked site have a new key admitted; the old ones stay refused. The caller holds the folder.

    Raises: ConfigError: it is not revoked. OutputError.
    """
    known_site(folder, site)
    marker = folder.site(site) / REVOKED
    if revocation(folder, site) is None:
        raise ConfigError(f"{site} is not revoked; there is nothing to restore.", kind="not-revoked")
    put_aside(marker, f"{REVOKED}.until-{stamp()}")


def known_site(folder: FederationFolder, site: str) -> None:
    """Raise ConfigError unless the site stands in federation.yaml."""
    sites = folder.config.sites
    if site not in sites:
        raise ConfigError(
            f"{folder.path / 'federation.yaml'}: there is no site {site!r}, only {', '.join(sites)}; add it "
            "there and run `quorate provision` again, or mend the name.",
            kind="unknown-site",
        )


def check_admissible(folder: FederationFolder, site: str) -> None:
    """Raise ConfigError unless the site stands in federation.yaml and is not revoked."""
    known_site(folder, site)
    if revocation(folder, site):
        message = f"{site} was revoked; take it back with `quorate certificates restore {site}` first."
        raise ConfigError(message, kind="site-revoked")


def known_sites(folder: FederationFolder) -> list[str]:
    """Return the sites that have a folder, whether or not federation.yaml still names them."""
    sites = folder.path / "sites"
    return sorted(path.name for path in sites.iterdir() if path.is_dir()) if sites.is_dir() else []


def stamp() -> str:
    """Return the time for the name of a file that is kept aside."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")


def _revocations(folder: FederationFolder, site: str) -> list[Revocation]:
    found = (_read(path) for path in sorted(folder.site(site).glob(f"{REVOKED}*")))
    return [each for each in found if each is not None]


def _read(path: Path) -> Revocation | None:
    if not path.exists():
        return None
    try:
        return Revocation.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError(f"{path}: is damaged; restore it from a copy. The site stays revoked.") from error
