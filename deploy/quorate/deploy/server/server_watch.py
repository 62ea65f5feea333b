"""A running server takes notice of what changes in its folder: keys, revocations, certificates."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time

from quorate.client.node.enrolment import NODE_PUB
from quorate.deploy.provision.node_keys import REVOKED
from quorate.deploy.server import flower_programs, nginx
from quorate.deploy.server.server_paths import ServerPaths

log = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_RETRY_SECONDS = 30.0


def watch(paths: ServerPaths) -> None:
    """Register the sites once the SuperLink answers, and see to every change after that; never returns."""
    seen = _marks(paths)
    taken = _register(paths)
    while True:
        time.sleep(_POLL_SECONDS if taken else _RETRY_SECONDS)
        try:
            now = _marks(paths)
            if now == seen and taken:
                continue
            log.info("keys or certificates have changed; taking them over")
            nginx.reload(paths)
            taken = _register(paths)
            seen = now
        except Exception as error:  # revocations after this one must be noticed all the same
            taken = False
            log.error("%s; trying again in %.0f s", error, _RETRY_SECONDS)


def _marks(paths: ServerPaths) -> dict[str, tuple[int, int]]:
    """Return what tells one state of the watched files from another: path -> number of the file, time."""
    watched = [paths.folder.path / "federation.yaml", paths.certificate, paths.key]
    watched += [paths.crl, paths.folder.ca / "index.json"]
    watched += (paths.folder.path / "sites").glob(f"*/{NODE_PUB}")
    watched += (paths.folder.path / "sites").glob(f"*/{REVOKED}")
    found = {}
    for path in watched:
        try:
            state = path.stat()
        except FileNotFoundError:
            continue
        found[str(path)] = (state.st_ino, state.st_mtime_ns)  # files are replaced, never written into
    return found


def _register(paths: ServerPaths) -> bool:
    """Bring the SuperLink's nodes to the admitted keys; returns whether that was done.

    In another process: Flower is large, and this one stays; and gRPC's threads do not go with the forks of a
    supervisor.
    """
    command = [sys.executable, "-m", "quorate.deploy.server.registration", str(paths.folder.path)]
    done = subprocess.run(command, env={**os.environ, **flower_programs.environment(paths)}, check=False)
    if done.returncode != 0:
        log.error("the sites' keys were not all taken over, for the reason above; trying again soon")
    return done.returncode == 0
