"""Starting and stopping the server."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time

from quorate.deploy.environment import prepare_environment
from quorate.deploy.server import flower, nginx
from quorate.deploy.server.checks import check_before_start
from quorate.deploy.server.health import problems, superlink_problem
from quorate.deploy.server.keys import admitted
from quorate.deploy.server.loopback import make_loopback_certificate
from quorate.deploy.server.paths import NGINX, ServerPaths
from quorate.server.federation import FederationFolder
from quorate.shared.errors import OutputError
from quorate.shared.files import write_atomically
from quorate.shared.supervisor import Program, Supervisor, read_status, start_detached

log = logging.getLogger(__name__)

READY_SECONDS = 300.0
"""Longest wait for everything to be up; importing Flower takes a minute on a busy machine."""
_POLL_SECONDS = 0.5


def prepare(paths: ServerPaths) -> list[Program]:
    """Check everything, write what the programs read, and return them in the order they start.

    Raises: ConfigError, OutputError.
    """
    if read_status(paths.supervisor) is not None:
        raise OutputError(
            f"the server of {paths.folder.config.name} is running already; see `quorate server status`, or "
            "stop it with `quorate server stop`."
        )
    paths.make()
    check_before_start(paths)
    make_loopback_certificate(paths)
    flower.write_flower_files(paths)
    nginx.configure(paths)
    public = Program(NGINX, nginx.command(paths), log=paths.logs / "nginx.log", cwd=paths.nginx)
    return [flower.superlink(paths), flower.superexec(paths), public]


def run(folder: FederationFolder) -> None:
    """Run the server until SIGTERM or SIGINT. To be called from the main thread.

    Raises: ConfigError, OutputError: it cannot start.
    """
    prepare_environment()
    paths = ServerPaths(folder)
    programs = prepare(paths)
    threading.Thread(target=_register_when_up, args=[paths], daemon=True).start()
    Supervisor(paths.supervisor, programs).run()


def start(folder: FederationFolder) -> None:
    """Start the server in the background; returns when sites can connect.

    Raises: ConfigError, OutputError: it cannot start. QuorateError: it did not come up; says where to look.
    """
    paths = ServerPaths(folder)
    prepare(paths)  # here for its errors; the other process does it again
    begun = time.time()

    def ready() -> bool:
        registered = folder.nodes_file.exists() and folder.nodes_file.stat().st_mtime >= begun
        return registered and not any(problems(paths).values())

    program = [sys.executable, "-c", "from quorate.deploy.cli import main; main()"]
    command = [*program, "server", "start", "--foreground", "--federation", str(folder.path)]
    start_detached(command, paths.supervisor, paths.logs / "server.log", ready, READY_SECONDS)


def register_sites(paths: ServerPaths) -> dict[int, str]:
    """Bring the SuperLink's nodes to the admitted keys and write nodes.json; returns node id -> site.

    Raises: ConfigError: a key cannot be used. QuorateError: the SuperLink does not answer.
    """
    names = flower.register(paths, admitted(paths.folder))
    content = json.dumps({str(node): site for node, site in names.items()}, indent=2)
    write_atomically(paths.folder.nodes_file, (content + "\n").encode())
    return names


def _register_when_up(paths: ServerPaths) -> None:
    """Register sites once the SuperLink answers. In another process: Flower is large, and this one stays."""
    while superlink_problem(paths) is not None:
        time.sleep(_POLL_SECONDS)
    command = [sys.executable, "-m", "quorate.deploy.server.registering", str(paths.folder.path)]
    done = subprocess.run(command, env={**os.environ, **flower.environment(paths)}, check=False)
    if done.returncode != 0:
        log.error("the sites' keys were not registered; mend what is said above and start the server again")
