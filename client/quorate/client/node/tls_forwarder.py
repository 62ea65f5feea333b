"""Mutual TLS: a forwarder on loopback that adds the site's client certificate, which Flower cannot.

    SuperNode -> TLS on loopback -> nginx -> TLS with client certificate -> server

Flower signs with its node key over TLS alone, so loopback has TLS too, with a certificate that each start
makes anew and that nobody outside this machine trusts.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from quorate.client.node.folder import SiteFolder
from quorate.client.node.programs import Ports, flower_programs
from quorate.client.node.users import accounts
from quorate.shared.errors import ConfigError
from quorate.shared.process.files import write_atomically
from quorate.shared.process.loopback import HOST, find_nginx, write_loopback_pair
from quorate.shared.process.supervisor import Program

NEEDED = ", and the server asks for a client certificate, which it adds"
# Ends a word or a block in nginx's configuration, or begins a variable.
_UNSAFE = re.compile(r"[\s;{}$\"'\\#]")
_TEMPLATE = """\
# Written by `quorate site start`; changes are lost at the next start.
daemon off;
pid {state}/nginx.pid;
error_log stderr warn;
worker_processes 1;
{user}
events {{ worker_connections 256; }}

http {{
    server_tokens off;
    access_log off;
    client_body_temp_path {state}/body;
    proxy_temp_path {state}/proxy;
    fastcgi_temp_path {state}/fastcgi;
    uwsgi_temp_path {state}/uwsgi;
    scgi_temp_path {state}/scgi;

    upstream server {{ server {server}; keepalive 4; }}

    server {{
        listen {loopback}:{port} ssl;
        ssl_certificate {state}/loopback.crt;
        ssl_certificate_key {state}/loopback.key;
        ssl_protocols TLSv1.3;
        client_max_body_size 8m;

        location / {{
            proxy_pass https://server;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host {host};
            proxy_request_buffering off;
            proxy_buffering off;
            proxy_connect_timeout 30s;
            proxy_read_timeout 120s;
            proxy_next_upstream off;
            proxy_ssl_server_name on;
            proxy_ssl_name {host};
            proxy_ssl_verify on;
            proxy_ssl_trusted_certificate {ca};
            proxy_ssl_certificate {certificate};
            proxy_ssl_certificate_key {key};
            proxy_ssl_protocols TLSv1.2 TLSv1.3;
        }}
    }}
}}
"""


def forwarder_folder(site: SiteFolder) -> Path:
    """Return where the forwarder's files lie."""
    return site.supernode / "forward"


def loopback_certificate(site: SiteFolder) -> Path:
    """Return the certificate that the SuperNode trusts in place of the federation's authority."""
    return forwarder_folder(site) / "loopback.crt"


def forwarded_to(ports: Ports) -> str:
    """Return HOST:PORT where the forwarder listens."""
    return f"{HOST}:{ports.forward}"


def forward_program(site: SiteFolder, ports: Ports) -> Program:
    """Write what the forwarder reads, and return it.

    Raises: ConfigError: nginx or the client certificate is missing. OutputError.
    """
    for path in (site.client_key, site.client_crt):
        if not path.is_file():
            raise ConfigError(
                f"{path} is missing, and connection.yaml says that the server asks for a client certificate; "
                "send client.csr to the coordinator (`quorate site enrol` makes it), and put the client.crt "
                "that comes back here."
            )
    if _UNSAFE.search(str(site.path)) or _UNSAFE.search(str(site.state)):
        raise ConfigError(
            f"{site.path}: a path with blanks, quotes or any of ; {{ }} $ # cannot stand in nginx's "
            "configuration; move the site's folder."
        )
    both = accounts(site.users)
    folder = forwarder_folder(site)
    folder.mkdir(mode=0o700, exist_ok=True)
    write_loopback_pair(loopback_certificate(site), folder / "loopback.key", "Quorate site on loopback")
    host = site.connection.server.rpartition(":")[0].strip("[]")
    content = _TEMPLATE.format(
        state=folder,
        # Started as the SuperNode's user, it has no rights to give up; started as root, it would.
        user="user root;" if both is None and os.geteuid() == 0 else "",
        server=site.connection.server,
        host=f"[{host}]" if ":" in host else host,
        loopback=HOST,
        port=ports.forward,
        ca=site.ca,
        certificate=site.client_crt,
        key=site.client_key,
    )
    write_atomically(folder / "nginx.conf", content.encode())
    if both is not None:
        for path in (folder, *folder.iterdir()):
            os.chown(path, both[1].uid, both[1].gid, follow_symlinks=False)
    command = (find_nginx(NEEDED), "-e", "stderr", "-p", str(folder), "-c", str(folder / "nginx.conf"))
    return Program(
        "forward", command, site.logs / "forward.log", cwd=folder, user=both[1].name if both else None
    )


def connecting_programs(site: SiteFolder) -> list[Program]:
    """Return the programs that connect a site, in the order they start: with mutual TLS the forwarder first.

    Raises: ConfigError: nginx or the client certificate is missing. OutputError.
    """
    ports = Ports.free()
    if not site.connection.mutual_tls:
        return list(flower_programs(site, ports))
    forward = forward_program(site, ports)
    return [forward, *flower_programs(site, ports, forwarded_to(ports), loopback_certificate(site))]
