"""Names that the parts of a site's operation share. Imports nothing heavy."""

from __future__ import annotations

from enum import StrEnum

SOCKET = "QUORATE_SITE_SOCKET"
"""Environment variable of the ClientApp: the resident site's socket."""
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""Environment of everything of Flower's: no telemetry, no look at the package index, nothing installed."""
CONTACT = "QUORATE_SITE_CONTACT"
"""Environment variable of the SuperNode: the file that says how it stands with the server."""


class Half(StrEnum):
    """A half of a site."""

    site = "site"
    supernode = "supernode"
