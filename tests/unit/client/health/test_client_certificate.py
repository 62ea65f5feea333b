"""`quorate site check` on the client certificate: of what is wrong with it the server says 403 at most."""

import shutil
from pathlib import Path

import pytest
from federations import join, make
from loopback import NEEDS_NGINX

from quorate.client.health.site_check import Line, check
from quorate.deploy.provision.issuing import sign_site


@pytest.fixture
def sites(tmp_path: Path) -> dict[str, Path]:
    """Two enrolled sites of a federation with mutual TLS; nobody listens at its server's address."""
    folder, authority = make(tmp_path, hostname="localhost", addresses=[], port=9, mutual_tls=True)
    joined = {name: join(folder, name, tmp_path) for name in ("north", "south")}
    for name, site in joined.items():
        signed = sign_site(folder, authority, name, site / "client.csr")
        shutil.copy(signed.path, site / "client.crt")
    return joined


def found(site: Path) -> dict[str, Line]:
    return {line.what: line for line in check(site)}


@NEEDS_NGINX
def test_a_sites_own_certificate_is_right(sites: dict[str, Path]) -> None:
    assert found(sites["north"])["client.crt"].ok


def test_the_certificate_of_another_site_is_found_before_the_server_is_asked(sites: dict[str, Path]) -> None:
    for name in ("client.crt", "client.key"):
        shutil.copy(sites["south"] / name, sites["north"] / name)
    lines = found(sites["north"])
    assert not lines["client.crt"].ok and "is that of quorate:lungs/south" in lines["client.crt"].found
    assert "server" not in lines


def test_the_certificate_of_another_key_is_found(sites: dict[str, Path]) -> None:
    shutil.copy(sites["south"] / "client.crt", sites["north"] / "client.crt")
    assert "belongs to another key" in found(sites["north"])["client.crt"].found
