"""What server and site both run on loopback: TLS under a certificate of each start's own, and nginx."""

from __future__ import annotations

import datetime
import ipaddress
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from quorate.shared.errors import ConfigError
from quorate.shared.process.files import PRIVATE, write_atomically

HOST = "127.0.0.1"
_YEARS = 10  # until the next start


def write_loopback_pair(certificate: Path, key: Path, subject: str, names: Sequence[str] = ()) -> None:
    """Write a new key, and a certificate for HOST that nobody outside this machine trusts.

    Args:
        certificate: file to write, PEM, mode 0600.
        key: file to write, PEM, mode 0600.
        subject: common name, for people.
        names: host names besides HOST.
    Raises: OutputError: they cannot be written.
    """
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    now = datetime.datetime.now(datetime.UTC)
    alternatives = [*map(x509.DNSName, names), x509.IPAddress(ipaddress.ip_address(HOST))]
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # clocks are set back at times
        .not_valid_after(now + datetime.timedelta(days=365 * _YEARS))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        # It is its own authority: OpenSSL asks for that where it is all that is trusted.
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(private, hashes.SHA256())
    )
    content = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_atomically(key, content, PRIVATE)
    write_atomically(certificate, signed.public_bytes(Encoding.PEM), PRIVATE)


def find_nginx(why: str = "") -> str:
    """Return the path of nginx.

    Args:
        why: what it is needed for, to stand in the message after "nginx is not installed".
    Raises: ConfigError: it is not installed.
    """
    # Not on the PATH of ordinary users on Debian.
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    found = shutil.which("nginx", path=places)
    if found is None:
        raise ConfigError(
            f"nginx is not installed{why}; install it with `apt-get install nginx-light` (Debian, Ubuntu) or "
            "`dnf install nginx` (Fedora, RHEL). Its own service may stay off.",
            kind="no-nginx",
        )
    return found
