"""Starting a site: the site process and Flower's programs under one supervisor.

`python -m quorate.client.node.site_start FOLDER` runs it in the foreground.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import NoReturn

from quorate.client.flower.allowed_commands import write_commands
from quorate.client.node.connection_state import ConnectionState, read_connection_state
from quorate.client.node.folder import SiteFolder
from quorate.client.node.programs import site_program
from quorate.client.node.supervise import become_supervisor, in_foreground
from quorate.client.node.tls_forwarder import connecting_programs
from quorate.client.node.users import check_enrolled, prepare_folders
from quorate.client.process.grpc_server import check_health
from quorate.shared.process.supervised import refuse_second, start_detached
from quorate.shared.process.supervisor import Program

READY_SECONDS = 300.0
"""Longest wait until all is up; importing torch takes a minute on a busy machine."""


def prepare(site: SiteFolder) -> list[Program]:
    """Check what is cheap to check, make the folders, and return the programs in the order they start.

    Raises: ConfigError: something is missing. OutputError: it runs already, or cannot be written.
    """
    refuse_second(
        site.supervisor,
        f"site {site.connection.site}",
        "see `quorate site status`, or stop it with `quorate site stop`",
    )
    check_enrolled(site)
    prepare_folders(site)
    write_commands(site.bin)
    return [site_program(site), *connecting_programs(site)]


def run(site: SiteFolder) -> NoReturn:
    """Turn this process into the supervisor of a site, which ends with SIGTERM or SIGINT.

    Raises: ConfigError, OutputError: it cannot start.
    """
    become_supervisor(site.supervisor, prepare(site))


def start(site: SiteFolder, timeout: float = READY_SECONDS) -> ConnectionState | None:
    """Start a site in the background; returns when its process takes requests and Flower runs.

    Returns: how it stands with the server; None when that is not known yet.
    Raises: ConfigError, OutputError: it cannot start. QuorateError: it did not come up; says where to look.
    """
    prepare(site)  # here for its errors; the other process does it again
    begun = time.time()

    def fresh() -> ConnectionState | None:
        found = read_connection_state(site.contact)
        return found if found is not None and found.last >= begun else None

    start_detached(
        [sys.executable, "-P", "-m", "quorate.client.node.site_start", str(site.path)],
        site.supervisor,
        site.logs / "supervisor.log",
        lambda: fresh() is not None and check_health(site.socket),
        timeout,
    )
    return fresh()


def main(arguments: list[str]) -> int:
    """Run a site in the foreground; returns the exit code."""
    return in_foreground(lambda: run(SiteFolder.find(Path(arguments[0]))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
