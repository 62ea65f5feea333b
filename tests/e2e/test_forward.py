"""The forwarder of mutual TLS, against an nginx that asks for a client certificate as the server's does."""

import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from loopback import NEEDS_NGINX
from plain_flower import free_port, make_certificates, make_node_key, wait_until

from quorate.client.node.folder import SiteFolder
from quorate.client.node.programs import Ports, flower_programs
from quorate.client.node.tls_forwarder import forward_program, forwarded_to, loopback_certificate
from quorate.client.node.users import prepare_folders
from quorate.shared.errors import ConfigError
from quorate.shared.process.loopback import find_nginx

pytestmark = [pytest.mark.slow, NEEDS_NGINX]
SERVER = """
daemon off; pid {folder}/nginx.pid; error_log stderr; {user}
events {{}}
http {{
    access_log off;
    client_max_body_size 8m;
    client_body_temp_path {folder}/body;
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {folder}/server.crt;
        ssl_certificate_key {folder}/server.key;
        ssl_verify_client on;
        ssl_client_certificate {folder}/ca.crt;
        location / {{ return 200 "$ssl_client_s_dn $http_flwr_public_key $uri"; }}
    }}
}}
"""


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    import os

    port = free_port()
    make_certificates(tmp_path, mutual=True)
    user = "user root;" if os.geteuid() == 0 else ""
    (tmp_path / "nginx.conf").write_text(SERVER.format(folder=tmp_path, port=port, user=user))
    server = subprocess.Popen([find_nginx(), "-e", "stderr", "-c", str(tmp_path / "nginx.conf")])
    yield port
    server.terminate()
    server.wait(20)


def test_what_goes_through_the_forwarder_has_the_client_certificate(tmp_path: Path, port: int) -> None:
    folder = tmp_path / "north"
    folder.mkdir()
    (folder / "site.yaml").write_text("data: {notes: {source: notes.csv}}\n")
    (folder / "connection.yaml").write_text(
        f"federation: f\nsite: north\nserver: localhost:{port}\nmutual_tls: true\n"
    )
    shutil.copy(tmp_path / "ca.crt", folder)
    make_node_key(folder)
    site, ports = SiteFolder.find(folder), Ports.free()
    prepare_folders(site)
    with pytest.raises(ConfigError) as caught:
        forward_program(site, ports)
    assert "client.csr" in str(caught.value)
    for name in ("client.crt", "client.key"):
        shutil.copy(tmp_path / name, folder)
    program = forward_program(site, ports)
    supernode, _ = flower_programs(site, ports, forwarded_to(ports), loopback_certificate(site))
    assert forwarded_to(ports) in supernode.command and str(loopback_certificate(site)) in supernode.command
    forwarder = subprocess.Popen(program.command, cwd=program.cwd)
    try:
        trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trust.load_verify_locations(cafile=str(loopback_certificate(site)))
        with httpx.Client(verify=trust, trust_env=False, timeout=30) as client:
            url = f"https://{forwarded_to(ports)}/v1/fleet/push-object"
            body = b"x" * (5 * 2**20 + 4096)  # one of Flower's chunks
            wait_until(lambda: _listens(client, url), 30, "the forwarder")
            reply = client.post(url, content=body, headers={"flwr-public-key": "KEY"})
        assert (reply.status_code, reply.text) == (200, "CN=client KEY /v1/fleet/push-object")
    finally:
        forwarder.terminate()
        forwarder.wait(20)
    # Without it, the server says no.
    straight = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    straight.load_verify_locations(cafile=str(tmp_path / "ca.crt"))
    with httpx.Client(verify=straight, trust_env=False, timeout=30) as client:
        assert client.post(f"https://localhost:{port}/").status_code == 400


def _listens(client: httpx.Client, url: str) -> bool:
    try:
        client.get(url)
    except httpx.ConnectError:
        return False
    return True
