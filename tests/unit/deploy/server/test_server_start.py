"""The server before it starts: what nginx is told, who is admitted, and what stops it with one sentence."""

from __future__ import annotations

import base64
import datetime
import os
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from loopback import NEEDS_NGINX, free_ports
from refusals import refuses

from quorate.deploy.cli import run
from quorate.deploy.provision.authority import Authority
from quorate.deploy.provision.issuing import revoke_site
from quorate.deploy.provision.provisioning import provision
from quorate.deploy.server import nginx, server_check
from quorate.deploy.server.admitted_keys import pins
from quorate.deploy.server.server_check import check_before_start, check_port
from quorate.deploy.server.server_paths import ServerPaths
from quorate.server.federation.folder import FederationFolder
from quorate.shared.errors import ConfigError
from quorate.shared.process.loopback import write_loopback_pair


@pytest.fixture
def provisioned(tmp_path: Path) -> Any:
    """Provision a federation of three sites, of which two have keys and certificates."""

    def make(name: str = "clinic", **server: Any) -> ServerPaths:
        port, superlink, health = free_ports(3)
        fields = {"hostname": "localhost", "listen": "127.0.0.1", "port": port, **server}
        ports = {"superlink_port": superlink, "health_port": health}
        content = {"name": "clinic", "server": {**fields, **ports}, "sites": ["north", "south"]}
        file = tmp_path / "federation.yaml"
        file.write_text(yaml.safe_dump(content))
        folder = provision(file, tmp_path / name, with_keys=True).folder
        content["sites"] = ["north", "south", "west"]
        (folder.path / "federation.yaml").write_text(yaml.safe_dump(content))
        paths = ServerPaths(folder)
        paths.make()
        write_loopback_pair(paths.loopback_certificate, paths.loopback_key, "loopback", ["localhost"])
        return paths

    return make


@NEEDS_NGINX
@pytest.mark.parametrize("mutual_tls", [False, True])
@pytest.mark.parametrize("listen", ["127.0.0.1", "::1"])
def test_nginx_accepts_its_configuration(provisioned: Any, mutual_tls: bool, listen: str) -> None:
    paths = provisioned(mutual_tls=mutual_tls, listen=listen)
    written = nginx.configure(paths)
    assert ("ssl_verify_client on;" in written.read_text()) is mutual_tls
    assert written.stat().st_mode & 0o077 == 0


@NEEDS_NGINX
def test_what_nginx_does_not_accept_is_said_before_it_starts(provisioned: Any) -> None:
    paths = provisioned()
    paths.key.write_text("no key")
    with refuses(ConfigError, "nginx-refuses") as caught:
        nginx.configure(paths)
    assert "nginx.conf" in caught.value.where


def test_a_certificate_goes_with_its_sites_key_and_no_other(provisioned: Any) -> None:
    paths = provisioned(mutual_tls=True)
    folder, found = paths.folder, {}
    for site in ("north", "south"):
        certificate = x509.load_pem_x509_certificate((folder.site(site) / "client.crt").read_bytes())
        key = load_ssh_public_key((folder.site(site) / "node.pub").read_bytes())
        pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        found[site] = (certificate.fingerprint(hashes.SHA1()).hex(), base64.b64encode(pem).decode())
    lines = re.findall(r'^ +([0-9a-f]{40}) "(\S+)";  # (\w+)$', nginx.render(paths), re.MULTILINE)
    assert {site: (certificate, key) for certificate, key, site in lines} == found
    revoke_site(folder, Authority(folder, "clinic"), "south")
    assert [pin.site for pin in pins(folder)] == ["north"]


def test_nothing_from_outside_can_break_out_of_the_configuration(provisioned: Any, tmp_path: Path) -> None:
    paths = provisioned("with blank")
    with refuses(ConfigError, "unsafe-path", where=str(paths.folder.path)):
        nginx.render(paths)
    with pytest.raises(ConfigError) as caught:
        provisioned(listen="0.0.0.0;")
    assert ": server.listen: " in str(caught.value)


def test_a_taken_port_is_named_with_who_has_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with refuses(ConfigError, where="server.port") as caught:
            check_port("127.0.0.1", port, "server.port")
        assert f"127.0.0.1:{port}" in str(caught.value) and f"process {os.getpid()}" in str(caught.value)
    check_port("127.0.0.1", port, "server.port")


def test_what_is_missing_is_said(provisioned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = provisioned()
    (paths.folder.server / "superexec.secret").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(server_check, "find_nginx", lambda: "nginx")
        with refuses(ConfigError, "not-provisioned") as caught:
            check_before_start(paths)
        assert "(superexec.secret" in str(caught.value) and "`quorate provision" in str(caught.value)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with refuses(ConfigError, "no-nginx"):
        check_before_start(paths)


def test_an_expired_certificate_is_said(provisioned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_check, "find_nginx", lambda: "nginx")
    paths = provisioned()
    check_before_start(paths)
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([])
    old = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=9))
        .not_valid_after(now - datetime.timedelta(days=3, hours=1))
        .sign(key, hashes.SHA256())
    )
    paths.certificate.write_bytes(old.public_bytes(Encoding.PEM))
    with refuses(ConfigError, "certificate-expired", where=str(paths.certificate)) as caught:
        check_before_start(paths)
    assert "3 days" in str(caught.value) and "`quorate certificates renew`" in str(caught.value)


@pytest.mark.parametrize("name", ["start", "status", "stop"])
def test_commands_end_with_2_where_there_is_no_federation(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUORATE_HOME", str(tmp_path))
    assert run(["server", name, "--federation", "nowhere"]) == 2
    assert "there is no federation 'nowhere'" in capsys.readouterr().err


def test_a_stopped_server_has_a_status_and_admits_sites(
    provisioned: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = provisioned()
    where = ["--federation", str(paths.folder.path)]
    assert run(["server", "status", *where]) == 1
    said = capsys.readouterr().out
    assert "does not run" in said and re.search(r"west +no key", said)
    north = paths.folder.site("north") / "node.pub"
    assert run(["server", "admit", "west", str(north), *where]) == 2
    assert "the key of north" in capsys.readouterr().err
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    (tmp_path / "west.pub").write_bytes(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    assert run(["server", "admit", "west", str(tmp_path / "west.pub"), *where]) == 0
    assert "it can connect once the server is started" in capsys.readouterr().out
    assert FederationFolder(paths.folder.path).site("west").joinpath("node.pub").exists()
