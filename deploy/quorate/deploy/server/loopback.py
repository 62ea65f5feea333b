"""The certificate that the SuperLink shows on loopback.

Flower checks node keys on a SuperLink with TLS alone, so loopback has TLS as well. The public certificate is
no good for it: its names are the server's public ones, its key is better in nginx alone, and it may be
renewed while a run goes on. So each start makes a pair of its own, which nobody outside this machine trusts.
"""

from __future__ import annotations

import datetime
import ipaddress

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from quorate.deploy.server.paths import ServerPaths
from quorate.shared.files import PRIVATE, write_atomically

HOST = "127.0.0.1"
_NAME = "localhost"
_YEARS = 10  # until the next start


def make_loopback_certificate(paths: ServerPaths) -> None:
    """Write a new key and a certificate of its own for loopback. Raises: OutputError."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Quorate SuperLink on loopback")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # clocks are set back at times
        .not_valid_after(now + datetime.timedelta(days=365 * _YEARS))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(_NAME), x509.IPAddress(ipaddress.ip_address(HOST))]),
            critical=False,
        )
        # It is its own authority: OpenSSL asks for that where it is all that is trusted.
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    content = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_atomically(paths.loopback_key, content, PRIVATE)
    write_atomically(paths.loopback_certificate, certificate.public_bytes(Encoding.PEM), PRIVATE)
