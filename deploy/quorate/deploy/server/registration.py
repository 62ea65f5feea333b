"""`python -m quorate.deploy.server.registration FOLDER`: bring a server's nodes to the admitted keys.

It is the only writer of nodes.json, one process at a time.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from quorate.deploy.failures import report_failure
from quorate.deploy.server import flower_programs
from quorate.deploy.server.admitted_keys import admitted
from quorate.deploy.server.health import superlink_problem
from quorate.deploy.server.server_paths import ServerPaths
from quorate.server.federation.folder import FederationFolder
from quorate.server.federation.nodes import Nodes
from quorate.shared.errors import ConfigError, QuorateError
from quorate.shared.process.supervised import read_status

_POLL_SECONDS = 0.5


def register_sites(paths: ServerPaths) -> Nodes:
    """Bring the SuperLink's nodes to the admitted keys, and write nodes.json.

    Returns: what was written; a key that Flower does not take stands in it as refused, and the others count.
    Raises: ConfigError: a key's file is damaged. QuorateError: the SuperLink does not answer.
    """
    nodes = flower_programs.register(paths, admitted(paths.folder))
    nodes.write(paths.folder)
    return nodes


def main() -> int:
    """Register; returns the exit code."""
    paths = ServerPaths(FederationFolder(Path(sys.argv[1])))
    try:
        _wait_for_superlink(paths)
        nodes = register_sites(paths)
    except Exception as error:
        return report_failure(error, show_traceback=False)
    for reason in nodes.refused.values():
        report_failure(ConfigError(reason), show_traceback=False)
    print(f"sites that may connect: {', '.join(nodes.sites.values()) or 'none yet'}", flush=True)
    return 0  # what Flower refused it will refuse again: only another key helps, and is noticed


def _wait_for_superlink(paths: ServerPaths) -> None:
    """Return once the SuperLink serves. Raises: QuorateError: the server was stopped meanwhile."""
    while superlink_problem(paths) is not None:
        time.sleep(_POLL_SECONDS)
        if read_status(paths.supervisor) is None:
            raise QuorateError("the server was stopped before its sites were registered.")


if __name__ == "__main__":
    sys.exit(main())
