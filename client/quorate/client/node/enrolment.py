"""Enrolment: a site makes its own keys, and sends the coordinator public files alone.

The node key is ECDSA on NIST P-384 in OpenSSH format, which is what Flower's SuperNode takes. With mutual TLS
there is a second key pair, whose certificate the coordinator signs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from quorate.client.policy.site_config import ConnectionConfig
from quorate.shared.config.read import load_file
from quorate.shared.errors import ConfigError
from quorate.shared.process.files import PRIVATE, PUBLIC, locked, put_aside, write_atomically

CONNECTION = "connection.yaml"
NODE_KEY, NODE_PUB = "node.key", "node.pub"
CLIENT_KEY, CLIENT_CSR, CLIENT_CRT = "client.key", "client.csr", "client.crt"


@dataclass(frozen=True)
class Enrolment:
    """What `enrol` left in the folder.

    Args:
        connection: whose site this is.
        send: files that the coordinator needs; they hold nothing secret.
        made: names of the files that this call wrote.
        kept_aside: older files that --renew moved out of the way.
    """

    connection: ConnectionConfig
    send: tuple[Path, ...]
    made: tuple[str, ...]
    kept_aside: tuple[Path, ...]


def enrol(folder: Path, *, renew: bool = False) -> Enrolment:
    """Make this site's keys, once: what is there already stays as it is.

    Interrupted at any moment, it goes on where it stopped when called again.

    Args:
        renew: make new keys; the old ones are kept beside them, with the time in their names.
    Raises: ConfigError: the folder is no kit, or a key in it is no key of ours. OutputError: not writable.
    """
    path = folder / CONNECTION
    if not path.is_file():
        message = f"{folder}: holds no {CONNECTION}; name the folder that the start-up kit unpacks to."
        raise ConfigError(message)
    connection = load_file(ConnectionConfig, path)
    made: list[str] = []
    with locked(folder):
        aside = _put_aside(folder, connection.mutual_tls) if renew else ()
        send = [_node_key(folder, connection, made)]
        if connection.mutual_tls:
            send.append(_client_key(folder, connection, made))
    return Enrolment(connection, tuple(send), tuple(made), aside)


def new_key() -> ec.EllipticCurvePrivateKey:
    """Return a new ECDSA key on P-384."""
    return ec.generate_private_key(ec.SECP384R1())


def node_private_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a node key as Flower reads it: OpenSSH, without a passphrase."""
    return key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.OpenSSH, pem.NoEncryption())


def node_public_bytes(key: ec.EllipticCurvePublicKey, site: str) -> bytes:
    """Return a node's public key as one OpenSSH line, with the site's name as comment."""
    return key.public_bytes(pem.Encoding.OpenSSH, pem.PublicFormat.OpenSSH) + f" {site}\n".encode()


def client_private_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a key of TLS as nginx reads it: PEM, PKCS 8, without a passphrase."""
    return key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())


def signing_request(key: ec.EllipticCurvePrivateKey, site: str) -> bytes:
    """Return the request for a client certificate in a site's name, in PEM."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA384())
    return request.public_bytes(pem.Encoding.PEM)


def _node_key(folder: Path, connection: ConnectionConfig, made: list[str]) -> Path:
    """Make node.key if there is none, and node.pub unless it is that key's; returns node.pub."""
    private, public = folder / NODE_KEY, folder / NODE_PUB
    key = _key(private, node_private_bytes, made)
    line = node_public_bytes(key.public_key(), connection.site)
    if not public.exists() or public.read_bytes() != line:
        write_atomically(public, line, PUBLIC)
        made.append(NODE_PUB)
    return public


def _client_key(folder: Path, connection: ConnectionConfig, made: list[str]) -> Path:
    """Make client.key if there is none, and client.csr unless it is that key's; returns client.csr."""
    private, request = folder / CLIENT_KEY, folder / CLIENT_CSR
    key = _key(private, client_private_bytes, made)
    if not _asks_for(request, key):  # signatures are random: an equal request would have other bytes
        write_atomically(request, signing_request(key, connection.site), PUBLIC)
        made.append(CLIENT_CSR)
    return request


def _key(
    path: Path, encode: Callable[[ec.EllipticCurvePrivateKey], bytes], made: list[str]
) -> ec.EllipticCurvePrivateKey:
    """Return the private key that lies there, making it if there is none."""
    if path.exists():
        return _load(path)
    key = new_key()
    write_atomically(path, encode(key), PRIVATE)
    made.append(path.name)
    return key


def _asks_for(path: Path, key: ec.EllipticCurvePrivateKey) -> bool:
    try:
        return x509.load_pem_x509_csr(path.read_bytes()).public_key() == key.public_key()
    except (FileNotFoundError, ValueError, UnsupportedAlgorithm):
        return False


def _load(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a private key that an earlier call made. Raises: ConfigError: it is another kind of file."""
    load = pem.load_ssh_private_key if path.name == NODE_KEY else pem.load_pem_private_key
    try:
        key = load(path.read_bytes(), password=None)
    except OSError as error:
        message = f"{path}: cannot be read: {error.strerror}; run this as the key's owner."
        raise ConfigError(message) from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path}: is no private key that Quorate made; restore it from a copy, or make new keys with "
            "`quorate site enrol --renew`."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: must be an ECDSA key; make new keys with `quorate site enrol --renew`.")
    return key


def _put_aside(folder: Path, mutual_tls: bool) -> tuple[Path, ...]:
    """Rename this site's keys, and what belongs to them, to NAME.old-TIME; returns the new paths."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    # Keys last: killed in between, the next call writes the public halves again from the keys that are there.
    names = (CLIENT_CRT, CLIENT_CSR, NODE_PUB, CLIENT_KEY, NODE_KEY) if mutual_tls else (NODE_PUB, NODE_KEY)
    moved = []
    for name in names:
        path = folder / name
        if path.exists():
            moved.append(put_aside(path, f"{name}.old-{stamp}"))
    return tuple(moved)
