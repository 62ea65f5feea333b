"""Flower's side of the server: the commands of its processes, and what the SuperLink knows of nodes."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from quorate.deploy.server.admitted_keys import Admitted
from quorate.deploy.server.flower_internals import UNREGISTERED, ControlClient, SuperNode
from quorate.deploy.server.server_paths import SUPEREXEC, SUPERLINK, ServerPaths
from quorate.server.federation.nodes import Nodes, SiteNode
from quorate.shared.errors import ConfigError, QuorateError
from quorate.shared.process.files import PRIVATE_FOLDER, write_atomically
from quorate.shared.process.loopback import HOST
from quorate.shared.process.supervisor import Program

FEDERATION = "QUORATE_FEDERATION"
"""Environment variable that tells `quorate.server.federation.flower_app` which federation it serves."""
TASK_POLL_SECONDS = 0.5
"""How often a SuperExec asks for work; Flower's own default is 1 s. It is asked once per submitted run."""
_SERVERAPP = "flwr-serverapp"


def flower_command(name: str) -> list[str]:
    """Return the start of a command line that runs one of Flower's programs."""
    return [sys.executable, "-m", "quorate.deploy.server.flower_main", name]


def environment(paths: ServerPaths) -> dict[str, str]:
    """Return the variables of the server's Flower processes, and of whoever gives `flwr` commands to them."""
    return {
        "FLWR_HOME": str(paths.flower),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(TASK_POLL_SECONDS),
        FEDERATION: str(paths.folder.path),
        "PATH": os.pathsep.join([str(paths.commands), "/usr/local/bin", "/usr/bin", "/bin"]),
        "PYTHONUNBUFFERED": "1",
        # Where a proxy leads outside, it does not lead back to loopback.
        "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), HOST])),
    }


def superlink(paths: ServerPaths) -> Program:
    """Return the SuperLink: on loopback, node keys on, runs in processes of their own, all of it on disk."""
    server = paths.folder.config.server
    return Program(
        SUPERLINK,
        [
            *flower_command("flower-superlink"),
            *("--host", HOST, "--port", str(server.superlink_port)),
            *("--ssl-ca-certfile", str(paths.loopback_certificate)),
            *("--ssl-certfile", str(paths.loopback_certificate), "--ssl-keyfile", str(paths.loopback_key)),
            "--enable-supernode-auth",
            # Started by the SuperLink itself, a ServerApp's token would stand in `ps`, its work would be open
            # to whoever asks first, and it would die with the SuperLink.
            *("--isolation", "process", "--superexec-auth-secret-file", str(paths.secret)),
            *("--database", str(paths.database)),
            "--disable-runtime-dependency-installation",
            *("--health-server-address", f"{HOST}:{server.health_port}"),
        ],
        log=paths.logs / f"{SUPERLINK}.log",
        env=environment(paths),
        cwd=paths.flower,
    )


def superexec(paths: ServerPaths) -> Program:
    """Return the SuperExec, which starts a ServerApp for every submitted run."""
    return Program(
        SUPEREXEC,
        [
            *flower_command("flower-superexec"),
            *("--runtime-api-address", f"{HOST}:{paths.folder.config.server.superlink_port}"),
            *("--root-certificates", str(paths.loopback_certificate)),
            *("--superexec-auth-secret-file", str(paths.secret)),
        ],
        log=paths.logs / f"{SUPEREXEC}.log",
        env=environment(paths),
        cwd=paths.flower,
        # Its ServerApps notice its death and tell the SuperLink that their run has failed, which takes a
        # second. Killed with it, they would leave the SuperLink waiting for their heartbeat for the better
        # part of a minute, and the run with it.
        kill_group=False,
    )


def write_flower_files(paths: ServerPaths) -> None:
    """Write what Flower looks for: the connection of its command line, and the ServerApp's command.

    The connection has the federation's name: `flwr list NAME`, with FLWR_HOME set to `state/flower`.

    Raises: OutputError.
    """
    # JSON's strings are TOML's.
    config = paths.folder.config
    name, address = json.dumps(config.name), json.dumps(f"{HOST}:{config.server.superlink_port}")
    lines = [
        "# Written by `quorate server start`.",
        "[superlink]",
        f"default = {name}",
        f"[superlink.{name}]",
        f"address = {address}",
        f"root-certificates = {json.dumps(str(paths.loopback_certificate))}",
    ]
    write_atomically(paths.flower / "config.toml", ("\n".join(lines) + "\n").encode())
    script = f'#!/bin/sh\nexec {shlex.join(flower_command(_SERVERAPP))} "$@"\n'
    write_atomically(paths.commands / _SERVERAPP, script.encode(), PRIVATE_FOLDER)


def nodes(paths: ServerPaths) -> list[SuperNode]:
    """Return the nodes that the SuperLink knows, also those that were unregistered.

    Raises: QuorateError: it does not answer.
    """
    with _control(paths) as client:
        return client.nodes()


def register(paths: ServerPaths, sites: list[Admitted]) -> Nodes:
    """Register every admitted key that is not, and unregister every other.

    A key that the SuperLink does not take is passed over, so that it keeps no other site out.

    Raises: QuorateError: the SuperLink does not answer, or does not unregister a key.
    """
    wanted = {each.public_key for each in sites}
    with _control(paths) as client:
        known = {node.public_key: node for node in client.nodes()}
        for key, node in known.items():
            if key not in wanted and node.state != UNREGISTERED:
                client.unregister(node.id)
        taken, refused = {}, {}
        for each in sites:
            try:
                taken[_id_of(client, each, known.get(each.public_key))] = each
            except ConfigError as error:
                refused[each.fingerprint] = str(error)
    nodes = {number: SiteNode(site=each.site, key=each.fingerprint) for number, each in taken.items()}
    return Nodes(nodes=nodes, refused=refused)


def _id_of(client: ControlClient, each: Admitted, known: SuperNode | None) -> int:
    """Return a node's id, registering it where need be. Raises: ConfigError: Flower does not take the key."""
    import httpx

    remedy = f"have {each.site} make another with `quorate site enrol --renew`, and admit it with --renew."
    if known is not None:
        if known.state == UNREGISTERED:
            raise ConfigError(
                f"{each.path}: this key was withdrawn once, and Flower takes no such key again; {remedy}"
            )
        return known.id
    try:
        return client.register(each.public_key, each.site)
    except httpx.HTTPStatusError as error:
        if not error.response.is_client_error:
            raise
        message = f"{each.path}: the SuperLink does not take this key ({error.response.text[:200]}); {remedy}"
        raise ConfigError(message) from error


@contextmanager
def _control(paths: ServerPaths) -> Iterator[ControlClient]:
    import httpx

    address = f"{HOST}:{paths.folder.config.server.superlink_port}"
    client = ControlClient(address, paths.loopback_certificate.read_bytes())
    try:
        yield client
    except httpx.HTTPError as error:
        said = error.response.text if isinstance(error, httpx.HTTPStatusError) else str(error)
        message = f"the SuperLink does not do as asked: {type(error).__name__}: {said[:500]}"
        raise QuorateError(message) from error
    finally:
        client.close()
