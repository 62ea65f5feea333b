"""Admitted sites: their public node keys, and which client certificate each key may come with."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from quorate.deploy.provision.keys import admit_key, revocation
from quorate.server.federation import FederationFolder
from quorate.shared.errors import ConfigError

KEY_FILE, CERTIFICATE_FILE = "node.pub", "client.crt"
_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)


@dataclass(frozen=True)
class Admitted:
    """A site that may connect.

    Args:
        site: its name.
        public_key: of its node, in PEM, as Flower registers it and SuperNodes send it.
        path: the file that holds it in OpenSSH's format.
    """

    site: str
    public_key: bytes
    path: Path


@dataclass(frozen=True)
class Pin:
    """A client certificate and the node key it may come with, as nginx compares them.

    Args:
        site: whose they are.
        certificate: SHA-1 of the certificate in hexadecimal, the one digest that nginx gives.
        key: the header that SuperNodes send: base64 of the public key in PEM.
    """

    site: str
    certificate: str
    key: str


def read_key(path: Path) -> bytes:
    """Return the public node key in a file, in PEM.

    Raises: ConfigError: the file holds anything but an ECDSA key on P-256, P-384 or P-521, in OpenSSH's
        format.
    """
    try:
        key = load_ssh_public_key(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; check the path.") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path}: holds no public key; it is the file node.pub that `quorate site enrol` made."
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVES):
        raise ConfigError(
            f"{path}: is no ECDSA key on P-256, P-384 or P-521, which Flower asks for; "
            "make one with `quorate site enrol`."
        )
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def admitted(folder: FederationFolder) -> list[Admitted]:
    """Return the sites of federation.yaml that have a key and are not revoked, in that order.

    Raises: ConfigError: a key is none, or two sites have the same.
    """
    found: dict[bytes, Admitted] = {}
    for site in folder.config.sites:
        path = folder.site(site) / KEY_FILE
        if not path.exists() or revocation(folder, site) is not None:
            continue
        key = read_key(path)
        if key in found:
            raise ConfigError(
                f"{path}: {found[key].site} has the same key; every site makes its own with "
                "`quorate site enrol`."
            )
        found[key] = Admitted(site, key, path)
    return list(found.values())


def admit(folder: FederationFolder, site: str, key_file: Path, *, renew: bool = False) -> bool:
    """Store the key of a site; returns whether it is a new one.

    Raises: ConfigError: as `admit_key`.
    """
    path = folder.site(site) / KEY_FILE
    before = path.read_bytes() if path.exists() else None
    return admit_key(folder, site, key_file, renew=renew).read_bytes() != before


def pins(folder: FederationFolder) -> list[Pin]:
    """Return a pin for every admitted site that has a client certificate.

    Raises: ConfigError: a certificate is none.
    """
    found = []
    for each in admitted(folder):
        path = folder.site(each.site) / CERTIFICATE_FILE
        if path.exists():
            digest = read_certificate(path).fingerprint(hashes.SHA1()).hex()
            found.append(Pin(each.site, digest, b64encode(each.public_key).decode("ascii")))
    return found


def read_certificate(path: Path) -> x509.Certificate:
    """Return the certificate in a PEM file.

    Raises: ConfigError: there is none.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}; make it with `quorate provision federation.yaml`."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{path}: holds no certificate; restore it from a copy, or renew it with `quorate provision`."
        ) from error
