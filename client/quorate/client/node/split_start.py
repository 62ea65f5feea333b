"""The two halves of a site, each started by itself: as two units of systemd, or in two containers.

    quorate site prepare FOLDER                              as root, where the two are two users
    quorate site start --foreground --only site FOLDER       data and training; needs no network
    quorate site start --foreground --only supernode FOLDER  Flower; needs neither data nor site.yaml

They share the socket and nothing else. QUORATE_SITE_SOCKET says where it is, for both; else it is
STATE/site.sock.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

from quorate.client.flower.allowed_commands import GUARDED, write_commands
from quorate.client.node.folder import SiteFolder
from quorate.client.node.names import Half
from quorate.client.node.supervise import become_supervisor
from quorate.client.node.tls_forwarder import connecting_programs
from quorate.client.node.users import check_enrolled, prepare_folders, prepare_home
from quorate.client.policy.site_config import UsersConfig
from quorate.shared.errors import ConfigError
from quorate.shared.process.supervisor import Program


class NodeFolder(SiteFolder):
    """A site's folder as the SuperNode's user sees it: site.yaml is not for its eyes, STATE is `state`."""

    @cached_property
    def users(self) -> UsersConfig | None:
        """Nobody to become: whoever starts this half is its user."""
        return None

    @property
    def state(self) -> Path:
        return self.path / "state"

    @property
    def logs(self) -> Path:
        """Output of the programs: in this half's own home."""
        return self.supernode / "logs"

    @property
    def supervisor(self) -> Path:
        """Lock and status of the supervisor: in this half's own home."""
        return self.supernode / "supervisor"


def prepare(site: SiteFolder) -> None:
    """Make the folders of a site, with owners and modes, and the only commands that Flower finds.

    Raises: ConfigError: users are missing. OutputError: cannot be written.
    """
    prepare_folders(site)
    write_commands(site.bin)


def supernode_programs(node: NodeFolder) -> list[Program]:
    """Return the programs of the half that talks to the server.

    Raises: ConfigError: something is missing. OutputError: cannot be written.
    """
    check_enrolled(node)
    prepare_home(node)
    # Where root has prepared STATE, this user cannot write there, nor put another launcher in.
    if not node.bin.exists() or os.access(node.bin, os.W_OK):
        write_commands(node.bin)
    elif not (node.bin / GUARDED).is_file():
        message = f"{node.bin}: {GUARDED} is missing; give `quorate site prepare {node.path}` as root."
        raise ConfigError(message)
    return connecting_programs(node)


def run(folder: Path, half: Half) -> int:
    """Run one half until SIGTERM or SIGINT; returns its exit code. The SuperNode's takes this process over.

    Raises: ConfigError, OutputError: it cannot start.
    """
    if half is Half.site:
        from quorate.client.process.main import main

        return main([str(folder)])
    node = NodeFolder(SiteFolder.find(folder).path)
    become_supervisor(node.supervisor, supernode_programs(node))
