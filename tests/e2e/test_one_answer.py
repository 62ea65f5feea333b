"""A run that ends between a message and its receipt, on purpose: the site answers the next one all the same.

Server, SuperNode, SuperExec and site process are real processes. Between them stands a gate, as nginx does,
that holds a call back until it is told to let it through.
"""

from __future__ import annotations

import http.client
import os
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from loopback import processes
from plain_flower import _SUBMIT, PlainServer, make_node_key, wait_until

from quorate.client.flower.allowed_commands import write_commands
from quorate.client.node.folder import SiteFolder
from quorate.client.node.programs import Ports, flower_programs, site_program
from quorate.client.node.users import prepare_folders
from quorate.client.process.grpc_server import check_health
from quorate.shared.protocol.bundle import bundle_dir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CONFIRM = "/v1/fleet/confirm-message-received"
OVERRIDES = 'run="0123456789abcdef"'


class Gate:
    """Passes calls on to a server, and holds receipts back while `open` is not set."""

    def __init__(self, server: PlainServer) -> None:
        self.open, self.held = threading.Event(), threading.Event()
        self.open.set()
        trust = ssl.create_default_context(cafile=str(server.folder / "ca.crt"))
        gate = self

        class Passing(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                if self.path == CONFIRM and not gate.open.is_set():
                    gate.held.set()
                    gate.open.wait()
                on = http.client.HTTPSConnection("localhost", server.port, context=trust, timeout=60)
                on.request("POST", self.path, body, dict(self.headers.items()))
                reply = on.getresponse()
                content = reply.read()
                on.close()
                self.send_response_only(reply.status)
                for name, value in reply.getheaders():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None: ...

        self._listener = ThreadingHTTPServer(("127.0.0.1", 0), Passing)
        self.port = self._listener.server_address[1]
        own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        own.load_cert_chain(server.folder / "server.crt", server.folder / "server.key")
        self._listener.socket = own.wrap_socket(self._listener.socket, server_side=True)
        threading.Thread(target=self._listener.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.open.set()
        self._listener.shutdown()
        self._listener.server_close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PlainServer]:
    (tmp_path / "server").mkdir()
    server = PlainServer(tmp_path / "server")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def gate(server: PlainServer) -> Iterator[Gate]:
    gate = Gate(server)
    yield gate
    gate.close()


@pytest.fixture
def site(tmp_path: Path, server: PlainServer, gate: Gate) -> Iterator[SiteFolder]:
    folder = tmp_path / "north"
    folder.mkdir()
    (folder / "notes.csv").write_text("text,label\n" + "fever,yes\nrash,no\n" * 10)
    (folder / "site.yaml").write_text("data: {notes: {source: notes.csv}}\n")
    (folder / "connection.yaml").write_text(f"federation: f\nsite: north\nserver: localhost:{gate.port}\n")
    shutil.copy(tmp_path / "server" / "ca.crt", folder)
    make_node_key(folder)
    server.register(folder / "node.pub", "north")
    site = SiteFolder.find(folder)
    prepare_folders(site)
    write_commands(site.bin)
    started = []
    try:
        for program in (site_program(site), *flower_programs(site, Ports.free())):
            with program.log.open("ab") as log:
                started.append(
                    subprocess.Popen(
                        program.command,
                        env={**os.environ, **program.env},
                        cwd=program.cwd,
                        stdout=log,
                        stderr=log,
                    )
                )
        wait_until(lambda: check_health(site.socket), 240, "the site process")
        yield site
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(60)


def test_a_run_that_ends_before_a_receipt_leaves_no_answer_behind(
    server: PlainServer, gate: Gate, site: SiteFolder
) -> None:
    def working() -> list[int]:
        return processes("quorate.client.flower.bundle_guard_main", str(site.socket))

    gate.open.clear()
    first = server.call([sys.executable, "-P", "-c", _SUBMIT, str(bundle_dir()), OVERRIDES]).split()[-1]
    wait_until(gate.held.is_set, 240, "a message without its receipt")
    wait_until(working, 60, "a program that answers it")
    wait_until(lambda: not working(), 120, "its answer")
    server.flwr("stop", first, "trial")
    gate.open.set()
    log = site.logs / "supernode.log"
    wait_until(lambda: f"Run ID {first} is not in `RUNNING` status" in log.read_text(), 120, "the refusal")
    # The answer of the site process to a message that is none of ours: it came all the way, and at once.
    assert server.probe(bundle_dir(), OVERRIDES) == {"nodes": 1, "answers": [[1001, "protocol"]]}
    assert server.probe(bundle_dir(), OVERRIDES) == {"nodes": 1, "answers": [[1001, "protocol"]]}
