"""The programs of a site: site process, Flower's SuperNode and its executor; command lines, environment.

Process isolation with a secret: in subprocess isolation any user of this machine could take the SuperNode's
tasks and answer in the site's name, and an executor that dies is not started again.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quorate.client.node.folder import SiteFolder
from quorate.client.node.names import CONTACT, QUIET, SOCKET
from quorate.client.node.users import SystemUser, accounts
from quorate.shared.process.loopback import HOST
from quorate.shared.process.supervisor import Program

_NEVER_PROXIED = ("127.0.0.1", "localhost", "::1")
_POLL = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}  # Flower's own setting; a second when left out
_SUPERNODE = (sys.executable, "-P", "-m", "quorate.client.flower.run_supernode")
_SUPEREXEC = (sys.executable, "-P", "-m", "quorate.client.flower.run_superexec")


@dataclass(frozen=True)
class Ports:
    """Loopback ports of one start.

    Args:
        runtime: of the SuperNode, for its executor.
        forward: where the forwarder of mutual TLS listens.
    """

    runtime: int
    forward: int

    @classmethod
    def free(cls) -> Ports:
        """Ask the system for free ports."""
        with socket.socket() as one, socket.socket() as two:
            for each in (one, two):
                each.bind((HOST, 0))
            return cls(one.getsockname()[1], two.getsockname()[1])


def site_program(site: SiteFolder) -> Program:
    """Return the resident site process."""
    both = accounts(site.users)
    env = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if both is not None:
        env |= _identity(both[0])
    return Program(
        "site",
        (sys.executable, "-P", "-m", "quorate.client.process.main", str(site.path)),
        site.logs / "site.log",
        env=env,
        cwd=site.path,
        user=both[0].name if both else None,
    )


def flower_programs(
    site: SiteFolder, ports: Ports, server: str | None = None, ca: Path | None = None
) -> tuple[Program, Program]:
    """Return the SuperNode, and the executor that starts our guarding launcher for it.

    Args:
        server: HOST:PORT that the SuperNode connects to; the server's when left out.
        ca: whose certificate is trusted there; the federation's authority when left out.
    """
    both = accounts(site.users)
    user = both[1] if both else None
    server = server or site.connection.server
    env = flower_environment(site, user, os.environ)
    runtime = f"{HOST}:{ports.runtime}"
    supernode = (
        *_SUPERNODE,
        *("--superlink", server, "--root-certificates", str(ca or site.ca)),
        *("--auth-supernode-private-key", str(site.node_key)),
        *("--node-config", f'site="{site.connection.site}"'),
        *("--host", HOST, "--port", str(ports.runtime)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(site.secret)),
    )
    superexec = (
        *_SUPEREXEC,
        *("--runtime-api-address", runtime, "--insecure", "--superexec-auth-secret-file", str(site.secret)),
    )

    def program(name: str, command: tuple[str, ...]) -> Program:
        return Program(
            name,
            command,
            site.logs / f"{name}.log",
            env=env,
            cwd=site.supernode,
            user=user.name if user else None,
        )

    return program("supernode", supernode), program("superexec", superexec)


def flower_environment(
    site: SiteFolder, user: SystemUser | None, inherited: Mapping[str, str]
) -> dict[str, str]:
    """Return what the environment of Flower's programs has on top of the inherited one.

    A proxy that HTTPS_PROXY names is used, but never for what stays on this machine.
    """
    # Both spellings: whoever reads them prefers the lower one.
    own = [name for spelling in ("no_proxy", "NO_PROXY") for name in inherited.get(spelling, "").split(",")]
    not_proxied = ",".join(dict.fromkeys(name.strip() for name in (*own, *_NEVER_PROXIED) if name.strip()))
    env = {
        **QUIET,
        **_POLL,
        "PATH": str(site.bin),
        "FLWR_HOME": str(site.supernode / "flower"),
        "no_proxy": not_proxied,
        "NO_PROXY": not_proxied,
        SOCKET: str(site.socket),
        CONTACT: str(site.contact),
    }
    if user is not None:
        env |= {**_identity(user), "HOME": str(site.supernode)}
    return env


def _identity(account: SystemUser) -> dict[str, str]:
    return {"HOME": str(account.home), "USER": account.name, "LOGNAME": account.name}
