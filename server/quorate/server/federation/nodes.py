"""Which of Flower's nodes is which site: written when keys are registered, read when a run starts."""

from __future__ import annotations

from pydantic import ValidationError

from quorate.server.federation.folder import FederationFolder
from quorate.shared.config.config_model import ConfigModel
from quorate.shared.errors import ConfigError
from quorate.shared.process.files import write_atomically


class SiteNode(ConfigModel):
    """A node that may connect."""

    site: str
    key: str
    """SHA-256 of the public key it signs with, in hex."""


class Nodes(ConfigModel):
    """Content of `nodes.json`: what came of bringing the SuperLink's nodes to the admitted keys."""

    nodes: dict[int, SiteNode]
    """Flower's node id -> node."""
    refused: dict[str, str] = {}
    """SHA-256 of an admitted key that the SuperLink did not take -> why, and what to do."""

    @classmethod
    def read(cls, folder: FederationFolder) -> Nodes:
        """Read what was written last.

        Raises: ConfigError: no key was registered yet, or an earlier release wrote the file.
        """
        try:
            return cls.model_validate_json(folder.nodes_file.read_bytes())
        except (FileNotFoundError, ValidationError) as error:
            raise ConfigError(
                f"{folder.nodes_file}: no sites are registered; start the server with `quorate server start`."
            ) from error

    def write(self, folder: FederationFolder) -> None:
        """Write it atomically, in place of what was there. Raises: OutputError."""
        write_atomically(folder.nodes_file, (self.model_dump_json(indent=2) + "\n").encode())

    @property
    def sites(self) -> dict[int, str]:
        """Flower's node id -> site."""
        return {number: node.site for number, node in self.nodes.items()}

    @property
    def keys(self) -> set[str]:
        """SHA-256 of every key that may connect."""
        return {node.key for node in self.nodes.values()}
