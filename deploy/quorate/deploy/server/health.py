"""Whether the server's programs do their work, asked of themselves."""

from __future__ import annotations

import socket
import ssl

import grpc
import psutil
from cryptography.hazmat.primitives.serialization import Encoding
from grpc_health.v1 import health_pb2, health_pb2_grpc

from quorate.deploy.server.admitted_keys import read_certificate
from quorate.deploy.server.server_paths import NGINX, SUPEREXEC, SUPERLINK, ServerPaths
from quorate.shared.process.loopback import HOST
from quorate.shared.process.supervised import read_status

_SECONDS = 5.0
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def problems(paths: ServerPaths) -> dict[str, str | None]:
    """Return program -> what is wrong with it; None: it works."""
    return {
        NGINX: nginx_problem(paths),
        SUPERLINK: superlink_problem(paths),
        SUPEREXEC: superexec_problem(paths),
    }


def nginx_problem(paths: ServerPaths) -> str | None:
    """Shake hands on the public port as a site does: the certificate must be good for the server's name."""
    server = paths.folder.config.server
    try:
        context = ssl.create_default_context(cafile=str(paths.ca))
        address = (_ANY.get(server.listen, server.listen), server.port)
        with (
            socket.create_connection(address, timeout=_SECONDS) as connection,
            context.wrap_socket(connection, server_hostname=server.hostname) as secured,
        ):
            shown = secured.getpeercert(binary_form=True)
    except ssl.SSLCertVerificationError as error:
        return f"its certificate is not good: {error.verify_message}"
    except OSError as error:  # ssl.SSLError is one
        return f"no TLS on port {server.port}: {error.strerror or error}"
    if shown != read_certificate(paths.certificate).public_bytes(Encoding.DER):
        return (
            f"shows another certificate than {paths.certificate}; a running server takes a renewed one over "
            "in seconds: if this stays, see server.log, or stop and start the server"
        )
    return None


def superlink_problem(paths: ServerPaths) -> str | None:
    """Ask the SuperLink's health service."""
    with grpc.insecure_channel(
        f"{HOST}:{paths.folder.config.server.health_port}", options=[("grpc.enable_http_proxy", 0)]
    ) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=_SECONDS
            )
        except grpc.RpcError as error:
            code = error.code().name if isinstance(error, grpc.Call) else type(error).__name__
            return f"its health service does not answer ({code})"
    serving = reply.status == health_pb2.HealthCheckResponse.SERVING
    return None if serving else "its health service says that it is not serving"


def superexec_problem(paths: ServerPaths) -> str | None:
    """See whether it is connected to the SuperLink, which it asks for work several times a second."""
    status = read_status(paths.supervisor)
    program = status.programs.get(SUPEREXEC) if status else None
    if program is None or program.pid is None:
        return "does not run"
    port = paths.folder.config.server.superlink_port
    try:
        connections = psutil.Process(program.pid).net_connections("tcp")
    except psutil.Error as error:
        return f"cannot be seen ({type(error).__name__})"
    connected = any(
        each.status == psutil.CONN_ESTABLISHED and each.raddr and each.raddr.port == port
        for each in connections
    )
    return None if connected else "is not connected to the SuperLink"
