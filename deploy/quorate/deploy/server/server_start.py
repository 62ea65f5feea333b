"""Starting and stopping the server, and admitting a site while it may be running."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from functools import partial
from pathlib import Path

import psutil

from quorate.deploy.environment import prepare_environment
from quorate.deploy.provision.node_keys import admit_key, admitted_key, fingerprint_of, read_public_key
from quorate.deploy.server import flower_programs, nginx
from quorate.deploy.server.health import problems
from quorate.deploy.server.server_check import check_before_start
from quorate.deploy.server.server_paths import NGINX, ServerPaths
from quorate.deploy.server.server_watch import watch
from quorate.server.federation.folder import FederationFolder
from quorate.server.federation.nodes import Nodes
from quorate.shared.errors import ConfigError, QuorateError
from quorate.shared.process.loopback import write_loopback_pair
from quorate.shared.process.supervised import read_status, refuse_second, start_detached
from quorate.shared.process.supervised import stop as stop_supervisor
from quorate.shared.process.supervisor import Program, Supervisor

log = logging.getLogger(__name__)

READY_SECONDS = 300.0
"""Longest wait for everything to be up; importing Flower takes a minute on a busy machine."""
_POLL_SECONDS = 0.2


def prepare(paths: ServerPaths) -> list[Program]:
    """Check everything, write what the programs read, and return them in the order they start.

    Raises: ConfigError, OutputError.
    """
    refuse_second(
        paths.supervisor,
        f"the server of {paths.folder.config.name}",
        "see `quorate server status`, or stop it with `quorate server stop`",
    )
    paths.make()
    check_before_start(paths)
    # Flower checks node keys on a SuperLink with TLS alone, so loopback has TLS as well. The public
    # certificate is no good for it: its names are public, its key is better in nginx alone, and it may be
    # renewed while a run goes on.
    write_loopback_pair(
        paths.loopback_certificate, paths.loopback_key, "Quorate SuperLink on loopback", ["localhost"]
    )
    flower_programs.write_flower_files(paths)
    nginx.configure(paths)
    public = Program(NGINX, nginx.command(paths), log=paths.logs / "nginx.log", cwd=paths.nginx)
    return [flower_programs.superlink(paths), flower_programs.superexec(paths), public]


def run(folder: FederationFolder) -> None:
    """Run the server until SIGTERM or SIGINT. To be called from the main thread.

    Raises: ConfigError, OutputError: it cannot start.
    """
    prepare_environment()
    paths = ServerPaths(folder)
    programs = prepare(paths)
    Supervisor(paths.supervisor, programs, beside=partial(watch, paths)).run()


def start(folder: FederationFolder) -> None:
    """Start the server in the background; returns when sites can connect.

    Raises: ConfigError, OutputError: it cannot start. QuorateError: it did not come up; says where to look.
    """
    paths = ServerPaths(folder)
    prepare(paths)  # here for its errors; the other process does it again
    begun = time.time()

    def ready() -> bool:
        # No earlier registration can write it now: none was running, and one ends with its SuperLink.
        file = folder.nodes_file
        written = file.exists() and file.stat().st_mtime >= begun
        return written and not any(problems(paths).values())

    program = [sys.executable, "-c", "from quorate.deploy.cli import main; main()"]
    command = [*program, "server", "start", "--foreground", "--federation", str(folder.path)]
    start_detached(command, paths.supervisor, paths.logs / "server.log", ready, READY_SECONDS)
    for reason in Nodes.read(folder).refused.values():
        log.warning("%s", reason)


def stop(folder: FederationFolder) -> bool:
    """Stop the server and all that it started; returns whether it ran. Afterwards none of it is left.

    Raises: QuorateError: it is still there after a minute.
    """
    paths = ServerPaths(folder)
    status = read_status(paths.supervisor)
    if status is None:
        return False
    # Its lock is free a moment before its process is gone.
    with contextlib.suppress(psutil.Error):
        supervisor = psutil.Process(status.pid)
        stop_supervisor(paths.supervisor)
        supervisor.wait(_POLL_SECONDS * 50)
    return True


def admit_site(folder: FederationFolder, site: str, key_file: Path, *, renew: bool = False) -> str:
    """Store the key of a site, and wait until a running server has it; returns one sentence of what was done.

    Raises: ConfigError: the key is none, or another site's, or the site has another, or Flower does not take
        it. QuorateError: the running server did not take it over.
    """
    paths, before = ServerPaths(folder), admitted_key(folder, site)
    key = fingerprint_of(read_public_key(admit_key(folder, site, key_file, renew=renew).read_bytes(), site))
    done = "is admitted"
    if before is not None and fingerprint_of(before) == key:
        done = "was admitted with this key before"
    if read_status(paths.supervisor) is None:
        return f"{site} {done}; it can connect once the server is started."
    # That nodes.json is a new one would not do: a registration that began before may be writing it.
    if not _registered(folder, key, READY_SECONDS):
        raise QuorateError(
            f"{site} {done}, but the running server has not taken its key over; "
            f"{paths.logs / 'server.log'} says why."
        )
    return f"{site} {done}; it can connect now."


def _registered(folder: FederationFolder, key: str, timeout: float) -> bool:
    """Wait until the running server has taken a key over; returns whether it did in time.

    Args:
        key: SHA-256 of the public key, in hex.
        timeout: longest wait [s].
    Raises: ConfigError: Flower does not take this key.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if folder.nodes_file.exists():
            nodes = Nodes.read(folder)
            if key in nodes.keys:
                return True
            if key in nodes.refused:
                raise ConfigError(nodes.refused[key])
        time.sleep(_POLL_SECONDS)
    return False
