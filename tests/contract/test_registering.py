"""Admitted keys and a real SuperLink: which of them it takes, and what is said of the others."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from loopback import free_ports, wait_for

from quorate.deploy.provision.node_keys import admit_key, admitted_key, fingerprint_of
from quorate.deploy.provision.provisioning import provision
from quorate.deploy.server import flower_programs
from quorate.deploy.server.health import superlink_problem
from quorate.deploy.server.registration import register_sites
from quorate.deploy.server.server_paths import ServerPaths
from quorate.deploy.server.server_start import admit_site
from quorate.deploy.server.server_status import _sites
from quorate.server.federation.folder import FederationFolder
from quorate.server.federation.nodes import Nodes, SiteNode
from quorate.shared.errors import ConfigError
from quorate.shared.process.loopback import write_loopback_pair
from quorate.shared.process.supervised import read_status

SUPERVISOR = """
import sys
from pathlib import Path
from quorate.shared.process.supervisor import Program, Supervisor
folder = Path(sys.argv[1])
Supervisor(folder, [Program("sleep", ["sleep", "600"], log=folder / "sleep.log")]).run()
"""


@pytest.fixture
def paths(tmp_path: Path) -> Iterator[ServerPaths]:
    """A federation of three sites without keys, and a supervisor as of a running server."""
    port, superlink, health = free_ports(3)
    server = {"hostname": "localhost", "listen": "127.0.0.1", "port": port}
    server |= {"superlink_port": superlink, "health_port": health}
    file = tmp_path / "federation.yaml"
    file.write_text(yaml.safe_dump({"name": "clinic", "server": server, "sites": ["east", "north", "west"]}))
    paths = ServerPaths(provision(file, tmp_path / "clinic").folder)
    paths.make()
    write_loopback_pair(paths.loopback_certificate, paths.loopback_key, "loopback", ["localhost"])
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(paths.supervisor)])
    wait_for(lambda: read_status(paths.supervisor), "no supervisor")
    yield paths
    supervisor.terminate()
    assert supervisor.wait(60) == 0


@pytest.fixture
def superlink(paths: ServerPaths) -> Iterator[None]:
    program = flower_programs.superlink(paths)
    with program.log.open("wb") as log:
        process = subprocess.Popen(
            program.command, stdout=log, stderr=log, env={**os.environ, **program.env}, cwd=program.cwd
        )
    wait_for(lambda: superlink_problem(paths) is None, "the SuperLink did not come up", 300)
    yield
    process.terminate()
    process.wait(60)


def new_key(folder: Path) -> Path:
    """A file as a site sends it."""
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    path = folder / f"{time.monotonic_ns()}.pub"
    path.write_bytes(public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return path


def fingerprint(folder: FederationFolder, site: str) -> str:
    key = admitted_key(folder, site)
    assert key is not None
    return fingerprint_of(key)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("superlink")
def test_a_key_that_flower_refuses_keeps_no_other_site_out(paths: ServerPaths, tmp_path: Path) -> None:
    first, folder = new_key(tmp_path), paths.folder
    admit_key(folder, "east", first)
    assert [*register_sites(paths).sites.values()] == ["east"]
    admit_key(folder, "east", new_key(tmp_path), renew=True)
    assert register_sites(paths).keys == {fingerprint(folder, "east")}  # the first one is withdrawn
    admit_key(folder, "east", first, renew=True)
    for site in ("north", "west"):
        admit_key(folder, site, new_key(tmp_path))
    register_sites(paths)
    written = Nodes.read(folder)
    assert {node.site: node.key for node in written.nodes.values()} == {
        site: fingerprint(folder, site) for site in ("north", "west")
    }
    (reason,) = written.refused.values()
    assert str(folder.site("east") / "node.pub") in reason and "quorate site enrol --renew" in reason
    with pytest.raises(ConfigError) as caught:
        admit_site(folder, "east", first)
    assert str(caught.value) == reason
    assert register_sites(paths) == written
    states = {site: found.state for site, found in _sites(paths, answers=True).items()}
    assert states == {"east": "refused", "north": "registered", "west": "registered"}


def test_a_site_is_told_to_connect_once_its_own_key_is_registered(paths: ServerPaths, tmp_path: Path) -> None:
    folder = paths.folder
    sent, renewed = new_key(tmp_path), new_key(tmp_path)
    other = SiteNode(site="north", key="0" * 64)

    def register(after: set[str]) -> None:
        """A registration of the earlier keys was going on; the next one takes the new key over."""
        before = admitted_key(folder, "west")
        wait_for(lambda: admitted_key(folder, "west") not in (None, before), "no key was admitted")
        old = {2: SiteNode(site="west", key=fingerprint_of(before))} if before else {}
        Nodes(nodes={1: other, **old}).write(folder)
        time.sleep(1)
        after.add(fingerprint(folder, "west"))
        Nodes(nodes={1: other, 3: SiteNode(site="west", key=fingerprint(folder, "west"))}).write(folder)

    for key, renew in ((sent, False), (renewed, True)):
        done: set[str] = set()
        thread = threading.Thread(target=register, args=[done])
        thread.start()
        said = admit_site(folder, "west", key, renew=renew)
        registered = set(done)
        thread.join()
        assert said == "west is admitted; it can connect now."
        assert registered == {fingerprint(folder, "west")}
    assert "admitted with this key before; it can connect now" in admit_site(folder, "west", renewed)
