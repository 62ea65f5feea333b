"""What a site says of the way to its server: a real TLS server with certificates of every age, or none."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from plain_flower import free_port, make_certificates

from quorate.client.health.server_reachability import CERTIFICATE, SERVER, server_lines
from quorate.client.node.folder import SiteFolder
from quorate.shared.process.looks import Line


class NotFound(BaseHTTPRequestHandler):
    """What the public port says of `/`."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def serving(folder: Path, days: float) -> Iterator[int]:
    make_certificates(folder, days)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    server = HTTPServer(("127.0.0.1", 0), NotFound)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "localhost")


def site_of(folder: Path, port: int) -> SiteFolder:
    (folder / "connection.yaml").write_text(f"federation: f\nsite: north\nserver: localhost:{port}\n")
    return SiteFolder.find(folder)


def looked(folder: Path, port: int, *, connected: bool = False) -> dict[str, Line]:
    lines = server_lines(site_of(folder, port), signed=False, connected=connected, seconds=10)
    return {each.what: each for each in lines}


@pytest.mark.parametrize(("days", "code"), [(60, 0), (2, 1)])
def test_the_servers_certificate_is_seen(tmp_path: Path, days: int, code: int) -> None:
    with serving(tmp_path, days) as port:
        lines = looked(tmp_path, port)
    assert lines[SERVER].ok and "clocks agree" in lines[SERVER].found
    assert lines[CERTIFICATE].exit_code == code


@pytest.mark.parametrize("connected", [False, True])
def test_an_expired_certificate_is_called_that_whether_or_not_a_connection_still_lasts(
    tmp_path: Path, connected: bool
) -> None:
    with serving(tmp_path, -1) as port:
        lines = looked(tmp_path, port, connected=connected)
    assert lines.keys() == {SERVER} and lines[SERVER].exit_code == 1
    assert "has expired" in lines[SERVER].found and "in between" not in lines[SERVER].found


def test_a_certificate_of_another_authority_is_a_matter_for_the_telephone(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    make_certificates(tmp_path)
    with serving(tmp_path / "other", 60) as port:
        lines = looked(tmp_path, port)
    assert lines[SERVER].exit_code == 2 and "by telephone" in lines[SERVER].found


def test_a_server_that_this_command_alone_cannot_reach_is_nothing_wrong_with_the_site(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    port = free_port()
    assert looked(tmp_path, port)[SERVER].exit_code == 1
    line = looked(tmp_path, port, connected=True)[SERVER]
    assert line.ok and "the SuperNode reaches it" in line.found
