"""`quorate server` on loopback, with real certificates: who gets in, what comes back, what is left behind."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from loopback import NEEDS_NGINX, free_ports, wait_for

from quorate.deploy.provision.authority import Authority
from quorate.deploy.provision.issuing import revoke_site
from quorate.deploy.provision.kit import unpack
from quorate.deploy.provision.provisioning import provision
from quorate.server.federation.folder import FederationFolder
from quorate.server.federation.nodes import Nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), NEEDS_NGINX]
SITES = ("east", "north", "south")


class Server:
    """A server of a federation whose sites have certificates; `client` speaks as a SuperNode does."""

    def __init__(self, folder: Path) -> None:
        self.port, superlink, health = free_ports(3)
        server = {"hostname": "localhost", "listen": "127.0.0.1", "port": self.port, "mutual_tls": True}
        server |= {"superlink_port": superlink, "health_port": health}
        (folder / "federation.yaml").write_text(
            yaml.safe_dump({"name": "clinic", "server": server, "sites": list(SITES)})
        )
        self.folder = provision(folder / "federation.yaml", folder / "clinic", with_keys=True).folder
        self.keys = folder / "keys"
        for site in SITES:
            (self.keys / site).mkdir(parents=True)
            for name, content in unpack(self.folder.site(site) / "kit.tar", site).items():
                (self.keys / site / Path(name).name).write_bytes(content)

    def quorate(self, *arguments: str, code: int = 0) -> str:
        command = [sys.executable, "-c", "from quorate.deploy.cli import main; main()", "server", *arguments]
        ended = subprocess.run(
            [*command, "--federation", str(self.folder.path)], capture_output=True, text=True, timeout=400
        )
        logs = "\n".join(path.read_text()[-3000:] for path in self.folder.state.glob("logs/*.log"))
        assert ended.returncode == code, f"{arguments}: {ended.stdout}\n{ended.stderr}\n{logs}"
        return ended.stdout + ended.stderr

    def context(self, certificate: str | None, ca: bool = True) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.folder.ca / "ca.crt") if ca else None)
        if certificate:
            site = self.keys / certificate
            context.load_cert_chain(site / "client.crt", site / "client.key")
        return context

    def post(
        self, path: str, certificate: str | None = "north", body: bytes = b"", method: str = "POST"
    ) -> int:
        context = self.context(certificate)
        with closing(
            http.client.HTTPSConnection("localhost", self.port, context=context, timeout=60)
        ) as connection:
            connection.request(method, path, body, {"Content-Type": "application/x-protobuf"})
            return connection.getresponse().status

    def activate(self, site: str, certificate: str | None = None) -> int | str:
        """Activate a site's node with its key, and another's certificate; the node id, or the HTTP status."""
        import httpx
        from cryptography.hazmat.primitives.serialization import load_ssh_private_key
        from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes
        from flwr.supercore.run import RunNotRunningException
        from flwr.supernode.fleet_http_client import FleetHttpClient
        from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

        private: Any = load_ssh_private_key((self.keys / site / "node.key").read_bytes(), None)
        public = private.public_key()
        signs = [RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(private, public)]
        with FleetHttpClient(
            f"https://localhost:{self.port}", interceptors=signs, verify=self.context(certificate or site)
        ) as client:
            try:
                request = ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=30)
                node = client.ActivateNode(request).node_id
                client.DeactivateNode(DeactivateNodeRequest(node_id=node))
                return int(node)
            except httpx.HTTPStatusError as error:
                return str(error.response.status_code)
            except RunNotRunningException:
                return "403"

    def nodes(self) -> dict[str, str]:
        return {str(number): site for number, site in Nodes.read(self.folder).sites.items()}

    def program(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.folder.state / "status.json").read_text())["programs"][name])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    assert f"sites connect to localhost:{server.port}" in server.quorate("start")
    yield server
    supervisor = json.loads((server.folder.state / "status.json").read_text())["pid"]
    family = [psutil.Process(supervisor), *psutil.Process(supervisor).children(recursive=True)]
    assert len(family) >= 6  # the supervisor, SuperLink, SuperExec, nginx and two workers of it
    server.quorate("stop")
    _, left = psutil.wait_procs(family, timeout=30)
    assert left == []


def test_only_who_knows_the_authority_shakes_hands(server: Server) -> None:
    assert server.post("/") == 404
    with (
        socket.create_connection(("localhost", server.port)) as connection,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        server.context("north", ca=False).wrap_socket(connection, server_hostname="localhost")
    assert server.post("/v1/fleet/pull-messages", certificate=None) == 400  # no client certificate


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/list-nodes",
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/v1/fleet/register-node",
        "/health",
        "/docs",
        "/v1/fleet/../control/list-nodes",
        "/v1/fleet/pull-messages/../../control/list-nodes",
        "/v1/fleet/pull-messages%2f..%2f..%2fcontrol%2flist-nodes",
        "//v1//control//list-nodes",
    ],
)
def test_the_public_port_has_no_other_paths(server: Server, path: str) -> None:
    assert server.post(path) == 404


def test_what_is_too_large_or_no_post_is_refused(server: Server) -> None:
    assert server.post("/v1/fleet/pull-messages", method="GET") == 405
    assert server.post("/v1/fleet/push-object", body=b"x" * (9 * 2**20)) == 413


def test_a_site_needs_its_key_and_its_own_certificate(server: Server) -> None:
    named = {site: int(node) for node, site in server.nodes().items()}
    assert server.activate("north") == named["north"]
    assert server.activate("south") == named["south"]
    assert server.activate("south", certificate="north") == "403"


def test_a_revoked_site_is_out_while_the_server_runs(server: Server) -> None:
    assert isinstance(server.activate("east"), int)
    revoke_site(server.folder, Authority(server.folder, "clinic"), "east")
    wait_for(lambda: "east" not in server.nodes().values(), "the server did not take notice", 120)
    assert server.activate("east") == "400"  # nginx: the certificate is in the list
    assert server.activate("east", certificate="north") == "403"
    assert isinstance(server.activate("north"), int)


@pytest.mark.parametrize("name", ["nginx", "superexec", "superlink"])
def test_what_is_killed_comes_back(server: Server, name: str) -> None:
    before = server.program(name)
    os.kill(before["pid"], signal.SIGKILL)
    wait_for(lambda: server.program(name)["pid"] not in (None, before["pid"]), "it did not come back", 60)
    wait_for(lambda: isinstance(try_to_activate(server), int), "no site can connect", 120)
    assert server.program(name)["restarts"] == before["restarts"] + 1


def try_to_activate(server: Server) -> int | str:
    try:
        return server.activate("north")
    except Exception as error:
        return type(error).__name__


def test_status_tells_how_it_stands(server: Server) -> None:
    def works() -> bool:
        return all(program["problem"] is None for program in status(server)["programs"].values())

    wait_for(works, "the server does not work", 120)
    told = status(server)
    # No SuperNode of any site runs, and no round could be: east is out, and nobody waits for it.
    assert not told["ok"] and told["sites"]["east"]["state"] == "revoked"
    assert {each["what"] for each in told["checks"] if not each["ok"]} == {"site north", "site south"}
    assert told["sites"]["north"]["admitted"] and told["sites"]["north"]["node_id"] in server.nodes()
    assert 360 < told["certificates"]["server"] <= 365
    assert "is running already" in server.quorate("start", code=2)
    assert re.search(r"nginx +\d+", server.quorate("status", code=1))


def status(server: Server) -> dict[str, Any]:
    command = [
        sys.executable,
        "-c",
        "from quorate.deploy.cli import main; main()",
        "server",
        "status",
        "--json",
    ]
    done = subprocess.run(
        [*command, "--federation", str(server.folder.path)], capture_output=True, text=True, timeout=200
    )
    return dict(json.loads(done.stdout))


def test_a_key_is_admitted_while_the_server_runs(server: Server) -> None:
    file = server.folder.path / "federation.yaml"
    content = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**content, "sites": [*content["sites"], "west"]}))
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    (server.keys / "west.pub").write_bytes(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    said = server.quorate("admit", "west", str(server.keys / "west.pub"))
    assert "it can connect now" in said and "west" in server.nodes().values()
    assert FederationFolder(server.folder.path).config.sites[-1] == "west"
