"""Admitted sites as nginx and Flower know them: node keys, and the client certificates that go with them."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from quorate.client.node.enrolment import NODE_PUB
from quorate.deploy.provision.authority import Authority
from quorate.deploy.provision.node_keys import admitted_key, fingerprint_of
from quorate.server.federation.folder import FederationFolder
from quorate.shared.errors import ConfigError


@dataclass(frozen=True)
class Admitted:
    """A site that may connect.

    Args:
        public_key: of its node, in PEM, as Flower registers it and SuperNodes send it.
        fingerprint: SHA-256 of that key, in hex.
        path: the file that holds it.
    """

    site: str
    public_key: bytes
    fingerprint: str
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


def admitted(folder: FederationFolder) -> list[Admitted]:
    """Return the sites of federation.yaml that have a key and are not revoked, in that order.

    Raises: ConfigError: a key's file is damaged.
    """
    found = []
    for site in folder.config.sites:
        key = admitted_key(folder, site)
        if key is not None:
            content = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            found.append(Admitted(site, content, fingerprint_of(key), folder.site(site) / NODE_PUB))
    return found


def pins(folder: FederationFolder) -> list[Pin]:
    """Return a pin for every valid client certificate of an admitted site.

    A site may have two for a while: the coordinator has renewed one, and the site uses the earlier one still.

    Raises: ConfigError: the authority's index is damaged.
    """
    index = Authority(folder, folder.config.name).index
    return [
        Pin(
            each.site, valid.x509.fingerprint(hashes.SHA1()).hex(), b64encode(each.public_key).decode("ascii")
        )
        for each in admitted(folder)
        for valid in index.valid("client", each.site)
    ]


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
            f"{path}: holds no certificate; restore it from a copy, or give `quorate certificates renew`."
        ) from error
