"""`ca/index.json`: every certificate that was issued or revoked, in order; nothing is ever taken out of it.

An issued certificate stands in it whole, and is issued at the moment this file is replaced: the files beside
it (`ca.crt`, `server.crt`, `client.crt`, `ca.crl`) follow from it and can be written again.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import AwareDatetime, Field, ValidationError

from quorate.shared.config.config_model import ConfigModel
from quorate.shared.errors import ConfigError
from quorate.shared.process.files import write_atomically

Role = Literal["ca", "server", "client"]


class Issued(ConfigModel):
    """A certificate."""

    event: Literal["issued"] = "issued"
    time: AwareDatetime
    role: Role
    name: str
    """Whose it is: the site for a client's, the host name for the server's, the federation for the CA's."""
    serial: str = Field(pattern=r"^[0-9a-f]+$")
    """Serial number, in hex."""
    not_after: AwareDatetime
    """End of its validity."""
    certificate: str
    """The certificate in PEM."""

    @classmethod
    def of(cls, role: Role, name: str, certificate: x509.Certificate) -> Issued:
        """Return the entry of a certificate that is issued now."""
        return cls(
            time=datetime.now(UTC),
            role=role,
            name=name,
            serial=f"{certificate.serial_number:x}",
            not_after=certificate.not_valid_after_utc,
            certificate=certificate.public_bytes(Encoding.PEM).decode(),
        )

    @property
    def x509(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.pem)

    @property
    def pem(self) -> bytes:
        """The content of its file."""
        return self.certificate.encode()


class Revoked(ConfigModel):
    """The end of a certificate before its time."""

    event: Literal["revoked"] = "revoked"
    time: AwareDatetime
    serial: str = Field(pattern=r"^[0-9a-f]+$")
    """Which certificate, in hex."""


class Index(ConfigModel):
    """Content of the file."""

    format: Literal[1] = 1
    federation: str
    events: tuple[Annotated[Issued | Revoked, Field(discriminator="event")], ...] = ()
    """What happened, oldest first."""

    @classmethod
    def read(cls, path: Path, federation: str) -> Index:
        """Read the file; an empty index if there is none.

        Raises: ConfigError: it cannot be read, is damaged, or belongs to another federation.
        """
        try:
            index = cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return cls(federation=federation)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}; run this as its owner.") from error
        except ValidationError as error:
            message = f"{path}: is damaged; restore it from a copy: without it nobody knows what was issued."
            raise ConfigError(message, kind="index-damaged") from error
        if index.federation != federation:
            raise ConfigError(
                f"{path}: belongs to the federation {index.federation!r}, not to {federation!r}; choose "
                "another folder (-o), or mend the name in federation.yaml."
            )
        return index

    def append(self, path: Path, *events: Issued | Revoked) -> Index:
        """Write the file with more events; returns the new index. Raises: OutputError."""
        longer = self.model_copy(update={"events": (*self.events, *events)})
        write_atomically(path, (longer.model_dump_json(indent=1) + "\n").encode())
        return longer

    def issued(self, role: Role, name: str | None = None) -> list[Issued]:
        """Return the certificates of a role, and of a name if one is given, oldest first."""
        every = (each for each in self.events if isinstance(each, Issued) and each.role == role)
        return [each for each in every if name in (None, each.name)]

    def revoked(self) -> dict[str, datetime]:
        """Return serial -> when it was revoked (the first time counts)."""
        events = [each for each in self.events if isinstance(each, Revoked)]
        return {each.serial: each.time for each in reversed(events)}

    def valid(self, role: Role, name: str | None = None) -> list[Issued]:
        """Return the certificates that are neither revoked nor past their end, oldest first."""
        revoked, now = self.revoked(), datetime.now(UTC)
        return [
            each for each in self.issued(role, name) if each.serial not in revoked and each.not_after > now
        ]
