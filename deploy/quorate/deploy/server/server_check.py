"""What must be right before the server starts; each of it ends in one error that says what to do."""

from __future__ import annotations

import errno
import socket

import psutil
from cryptography import x509

from quorate.deploy.server.admitted_keys import admitted, pins, read_certificate
from quorate.deploy.server.server_paths import ServerPaths
from quorate.shared.errors import ConfigError
from quorate.shared.process.looks import days_left
from quorate.shared.process.loopback import HOST, find_nginx


def check_before_start(paths: ServerPaths) -> None:
    """Check files, certificates, keys and ports.

    Raises: ConfigError: something is missing, expired or taken.
    """
    find_nginx()
    server = paths.folder.config.server
    needed = [paths.ca, paths.certificate, paths.key, paths.secret]
    if missing := [path for path in needed + [paths.crl] * server.mutual_tls if not path.is_file()]:
        raise ConfigError(
            f"{paths.folder.path} is not provisioned ({', '.join(path.name for path in missing)} missing); "
            f"give `quorate provision {paths.folder.path / 'federation.yaml'}` first.",
            kind="not-provisioned",
        )
    for path in (paths.ca, paths.certificate):
        left = days_left(read_certificate(path).not_valid_after_utc)
        if left < 0:
            raise ConfigError(
                f"{path}: expired {-left:.0f} days ago; give `quorate certificates renew`, then start again.",
                kind="certificate-expired",
            )
    if server.mutual_tls and (left := revocations_days_left(paths)) < 0:
        raise ConfigError(  # nginx would turn every site away
            f"{paths.crl}: the list of revoked certificates is {-left:.0f} days out of date; give "
            "`quorate provision` again, then start again."
        )
    admitted(paths.folder)
    pins(paths.folder)
    check_port(server.listen, server.port, "server.port")
    check_port(HOST, server.superlink_port, "server.superlink_port")
    check_port(HOST, server.health_port, "server.health_port")


def check_port(host: str, port: int, field: str) -> None:
    """Check that `host`:`port` can be listened on.

    Raises: ConfigError: it cannot; names the process that has it, where that can be known.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        # As nginx does; else old connections count.
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                why = f"is taken{_holder(port)}; stop that"
            elif error.errno in (errno.EACCES, errno.EPERM):
                why = "may not be opened by this user (ports below 1024 are the administrator's)"
            else:
                why = f"cannot be opened ({error.strerror})"
            message = f"{field}: {host}:{port} {why}, or choose another in federation.yaml."
            raise ConfigError(message) from error


def _holder(port: int) -> str:
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except psutil.Error:
        pass
    return ""


def revocations_days_left(paths: ServerPaths) -> float:
    """Return how long the list of revoked certificates is good for [days].

    Raises: ConfigError: it is none.
    """
    try:
        until = x509.load_pem_x509_crl(paths.crl.read_bytes()).next_update_utc
    except (OSError, ValueError) as error:
        message = f"{paths.crl}: is no list of revoked certificates; restore it from a copy."
        raise ConfigError(message) from error
    return days_left(until) if until is not None else float("inf")
