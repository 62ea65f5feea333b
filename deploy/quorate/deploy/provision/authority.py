"""The federation's certificate authority: one CA on P-384 that signs the server and, with mutual TLS, sites.

Its certificate and its key are made once and never again: what is missing later must come back from a copy.
`ca.key` may be kept off the machine; it is needed to sign and to revoke only.
"""

from __future__ import annotations

import ipaddress
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from quorate.client.node.enrolment import client_private_bytes, new_key
from quorate.deploy.provision.certificate_log import Index, Issued, Revoked, Role
from quorate.server.federation.folder import FederationFolder
from quorate.shared.errors import ConfigError
from quorate.shared.process.files import PRIVATE, PUBLIC, make_folder, write_atomically

CA_DAYS = 3652
"""Ten years."""
DAYS = 365
"""Validity of a certificate of the server or of a site, unless another is asked for."""
_COMMON_NAME = 64
"""Most characters of a common name. Sites' names are no longer; a host's counts as an alternative name."""
_SLACK = timedelta(hours=1)
"""Certificates begin a little in the past: clocks of sites may be slow."""


@dataclass(frozen=True)
class Authority:
    """The CA of one federation. Every method that writes expects the caller to hold the folder (`locked`)."""

    folder: FederationFolder
    federation: str

    @property
    def index(self) -> Index:
        """What was issued and revoked so far. Raises: ConfigError."""
        return Index.read(self._index_file, self.federation)

    @property
    def certificate(self) -> x509.Certificate:
        """The CA's certificate. Raises: ConfigError: there is none yet."""
        made = self.index.issued("ca")
        if not made:
            raise ConfigError(f"{self.folder.ca}: there is no CA; run `quorate provision` first.")
        return made[0].x509

    def ensure(self) -> list[Path]:
        """Make the CA if there is none, else complete it; returns the files that were written.

        Raises: ConfigError: a part is missing or damaged that cannot be made again.
        """
        certificate, crl, key_file = self.folder.ca / "ca.crt", self.crl_file, self._key_file
        written: list[Path] = []
        make_folder(self.folder.ca)
        if not self.index.issued("ca"):
            self._refuse_a_second_ca()
            if not key_file.exists():
                write_atomically(key_file, client_private_bytes(new_key()), PRIVATE)
                written.append(key_file)
            key = load_key(key_file)
            self.index.append(self._index_file, Issued.of("ca", self.federation, self._self_signed(key)))
            written.append(self._index_file)
        wanted = self.index.issued("ca")[0].pem
        if not certificate.exists():
            write_atomically(certificate, wanted, PUBLIC)
            written.append(certificate)
        elif certificate.read_bytes() != wanted:
            message = f"{certificate}: is not the certificate in index.json; restore both from one copy."
            raise ConfigError(message, kind="other-ca-certificate")
        if self._crl_lags():
            self.write_crl()
            written.append(crl)
        return written

    def issue(
        self, role: Role, name: str, key: ec.EllipticCurvePublicKey, hosts: Sequence[str], days: int
    ) -> Issued:
        """Sign a certificate and enter it into the index.

        Args:
            role: `server` or `client`.
            name: the common name: host name or site.
            hosts: host names and IP addresses that a server's certificate is for.
            days: validity; it never outlives the CA.
        Raises: ConfigError: the CA's key is missing or another's.
        """
        ca, now = self.certificate, datetime.now(UTC)
        if role == "server":
            usage, names = ExtendedKeyUsageOID.SERVER_AUTH, [general_name(host) for host in hosts]
            subject = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Quorate server")]
        else:
            usage, subject = ExtendedKeyUsageOID.CLIENT_AUTH, []
            names = [x509.UniformResourceIdentifier(f"quorate:{self.federation}/{name}")]
        if len(name) <= _COMMON_NAME:
            subject.append(x509.NameAttribute(NameOID.COMMON_NAME, name))
        builder = (
            _builder(x509.Name(subject), ca.subject, key)
            .not_valid_after(min(now + timedelta(days=days), ca.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(_authority_key_identifier(ca), critical=False)
        )
        issued = Issued.of(role, name, builder.sign(self._key(), hashes.SHA384()))
        self.index.append(self._index_file, issued)
        return issued

    def revoke(self, serials: Sequence[str]) -> None:
        """Revoke certificates (again is no harm), and write the list that the server reads."""
        self._key()  # before anything is entered: without the key the list would lag behind the index
        index = self.index
        new = [serial for serial in serials if serial not in index.revoked()]
        if new:
            now = datetime.now(UTC)
            index.append(self._index_file, *(Revoked(time=now, serial=serial) for serial in new))
        if self._crl_lags():
            self.write_crl()

    def ready(self) -> None:
        """Raise ConfigError unless the CA's key is there, so that something can be signed."""
        self._key()

    def write_crl(self) -> None:
        """Write ca.crl from the index. It is good as long as the CA: an old one would lock all sites out."""
        ca, index = self.certificate, self.index
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(ca.subject)
            .last_update(datetime.now(UTC) - _SLACK)
            .next_update(ca.not_valid_after_utc)
            .add_extension(x509.CRLNumber(len(index.events)), critical=False)
            .add_extension(_authority_key_identifier(ca), critical=False)
        )
        for serial, time in sorted(index.revoked().items()):
            entry = x509.RevokedCertificateBuilder().serial_number(int(serial, 16)).revocation_date(time)
            builder = builder.add_revoked_certificate(entry.build())
        content = builder.sign(self._key(), hashes.SHA384()).public_bytes(pem.Encoding.PEM)
        write_atomically(self.crl_file, content, PUBLIC)

    @property
    def crl_file(self) -> Path:
        return self.folder.ca / "ca.crl"

    @property
    def _index_file(self) -> Path:
        return self.folder.ca / "index.json"

    @property
    def _key_file(self) -> Path:
        return self.folder.ca / "ca.key"

    def _key(self) -> ec.EllipticCurvePrivateKey:
        if not self._key_file.exists():
            raise ConfigError(
                f"{self._key_file}: is missing, and nothing can be signed or revoked without it; restore it "
                "from your copy. A new CA would need new kits at every site.",
                kind="ca-key-missing",
            )
        key = load_key(self._key_file)
        if key.public_key() != self.certificate.public_key():
            message = f"{self._key_file}: is not the key of ca.crt; restore the right one."
            raise ConfigError(message, kind="other-ca-key")
        return key

    def _crl_lags(self) -> bool:
        """Whether ca.crl is missing or lacks a revocation."""
        try:
            crl = x509.load_pem_x509_crl(self.crl_file.read_bytes())
        except (FileNotFoundError, ValueError):
            return True
        return {f"{each.serial_number:x}" for each in crl} != set(self.index.revoked())

    def _refuse_a_second_ca(self) -> None:
        """Raise ConfigError if this folder had a CA once: what it issued would be worthless."""
        traces = [self.folder.ca / "ca.crt", self.folder.server / "server.crt"]
        traces += sorted((self.folder.path / "sites").glob("*/*"))
        if found := [path for path in traces if path.exists()]:
            raise ConfigError(
                f"{self._index_file}: is missing, but {found[0]} is there; restore the folder ca/ from a "
                "copy: a new CA would need new kits at every site.",
                kind="ca-lost",
            )

    def _self_signed(self, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Quorate CA"),
                x509.NameAttribute(NameOID.COMMON_NAME, self.federation),
            ]
        )
        end = datetime.now(UTC) + timedelta(days=CA_DAYS)
        return (
            _builder(name, name, key.public_key())
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(ca=True), critical=True)
            .sign(key, hashes.SHA384())
        )


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a private key in PEM. Raises: ConfigError: it is none, or others may read it."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; run this as its owner.") from error
    if mode & 0o077:
        message = f"{path}: others may use this private key (mode {mode:04o}); chmod 600 it."
        raise ConfigError(message, kind="key-exposed")
    try:
        key = pem.load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: is no private key that Quorate made; restore it from a copy.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: must be an ECDSA key; restore it from a copy.")
    return key


def general_name(host: str) -> x509.GeneralName:
    """Return a host name or IP address as it stands in a certificate."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - _SLACK)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_key_identifier(ca: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
