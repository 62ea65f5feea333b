"""`python -m quorate.deploy.server.registering FOLDER`: brings a running server's nodes to the admitted keys.

It is the only writer of nodes.json, one process at a time.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from quorate.deploy.failures import report_failure
from quorate.deploy.server import flower
from quorate.deploy.server.health import superlink_problem
from quorate.deploy.server.keys import admitted
from quorate.deploy.server.paths import ServerPaths
from quorate.server.federation import FederationFolder
from quorate.shared.errors import QuorateError
from quorate.shared.files import write_atomically
from quorate.shared.supervised import read_status

_POLL_SECONDS = 0.5


def register_sites(paths: ServerPaths) -> dict[int, str]:
    """Bring the SuperLink's nodes to the admitted keys and write nodes.json; returns node id -> site.

    Raises: ConfigError: a key cannot be used. QuorateError: the SuperLink does not answer.
    """
    names = flower.register(paths, admitted(paths.folder))
    content = json.dumps({str(node): site for node, site in names.items()}, indent=2)
    write_atomically(paths.folder.nodes_file, (content + "\n").encode())
    return names


def main() -> int:
    """Register; returns the exit code."""
    paths = ServerPaths(FederationFolder(Path(sys.argv[1])))
    try:
        _wait_for_superlink(paths)
        names = register_sites(paths)
    except Exception as error:
        return report_failure(error, show_traceback=False)
    print(f"sites that may connect: {', '.join(names.values()) or 'none yet'}", flush=True)
    return 0


def _wait_for_superlink(paths: ServerPaths) -> None:
    """Return once the SuperLink serves. Raises: QuorateError: the server was stopped meanwhile."""
    while superlink_problem(paths) is not None:
        time.sleep(_POLL_SECONDS)
        if read_status(paths.supervisor) is None:
            raise QuorateError("the server was stopped before its sites were registered.")


if __name__ == "__main__":
    sys.exit(main())
