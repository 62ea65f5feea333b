"""nginx, which ends TLS on the public port and lets the calls of SuperNodes through, and nothing else."""

from __future__ import annotations

import grp
import os
import pwd
import re
import subprocess
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from quorate.deploy.server.admitted_keys import pins
from quorate.deploy.server.server_paths import ServerPaths
from quorate.shared.errors import ConfigError, QuorateError
from quorate.shared.process.files import write_atomically
from quorate.shared.process.loopback import find_nginx

CALLS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "confirm-message-received",
    "pull-object",
    "push-object",
    "get-run",
    "get-fab",
)
"""What a SuperNode with a registered key calls under /v1/fleet/; tests compare it with Flower's client."""
_WORKER_USERS = ("www-data", "nginx", "nobody")
# Ends a word or a block in nginx's configuration, or begins a variable.
_UNSAFE = re.compile(r"[\s;{}$\"'\\#]")


def render(paths: ServerPaths) -> str:
    """Return nginx.conf for a federation.

    Raises: ConfigError: a path cannot stand in it.
    """
    server = paths.folder.config.server
    files = {
        "state": paths.nginx,
        "certificate": paths.certificate,
        "key": paths.key,
        "ca": paths.ca,
        "crl": paths.crl,
        "loopback_certificate": paths.loopback_certificate,
    }
    if _UNSAFE.search(str(paths.folder.path)):
        raise ConfigError(
            f"{paths.folder.path}: a path with blanks, quotes or any of ; {{ }} $ # cannot stand in nginx's "
            "configuration; move the federation's folder.",
            kind="unsafe-path",
        )
    environment = Environment(
        loader=PackageLoader("quorate.deploy.server"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # this is no HTML; names and paths are checked where they come in
    )
    return environment.get_template("nginx.conf.j2").render(
        name=paths.folder.config.name,
        user=_worker_user(),
        listen=f"[{server.listen}]" if ":" in server.listen else server.listen,
        port=server.port,
        superlink_port=server.superlink_port,
        mutual_tls=server.mutual_tls,
        pins=pins(paths.folder) if server.mutual_tls else [],
        calls=CALLS,
        **files,
    )


def configure(paths: ServerPaths) -> Path:
    """Write nginx.conf and have nginx check it.

    Raises: ConfigError: nginx does not accept it; says what nginx says.
    """
    path = paths.nginx / "nginx.conf"
    write_atomically(path, render(paths).encode())
    done = subprocess.run([*command(paths), "-t", "-q"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(f"nginx does not accept {path}: {done.stderr.strip()}", kind="nginx-refuses")
    return path


def command(paths: ServerPaths) -> list[str]:
    """Return nginx and its arguments; it stays in the foreground."""
    # -e: until it has read its configuration, nginx would write to the system's own error log.
    return [find_nginx(), "-e", "stderr", "-p", str(paths.nginx), "-c", str(paths.nginx / "nginx.conf")]


def reload(paths: ServerPaths) -> None:
    """Have a running nginx read certificates and pins again, without dropping a connection.

    Raises: ConfigError: the new configuration is not accepted, and the old one stays. QuorateError: no nginx
        runs.
    """
    configure(paths)
    done = subprocess.run([*command(paths), "-s", "reload"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise QuorateError(f"nginx was not reloaded: {done.stderr.strip()}")


def _worker_user() -> str | None:
    """Return user and group of the workers, which face the outside; None where it is not ours to say."""
    if os.geteuid() != 0:
        return None
    for name in _WORKER_USERS:
        try:
            user = pwd.getpwnam(name)
            return f"{name} {grp.getgrgid(user.pw_gid).gr_name}"  # nobody's group has another name on Debian
        except KeyError:
            continue
    return None
