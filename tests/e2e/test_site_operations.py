"""A site as its people run it: started, asked by a server that sends code of its own, killed, stopped.

Server, proxy, SuperNode and site process are real processes; as root, the last two run as two other users.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import connect_proxy
import pytest
from other_users import interpreter
from plain_flower import PlainServer, free_port, wait_until

from quorate.client.node.users import SystemUser, reads
from quorate.shared.protocol.bundle import bundle_dir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RUN = 'run="0123456789abcdef"'
HOSTILE = """
from pathlib import Path
Path({marker!r}).touch()
from flwr.clientapp import ClientApp
app = ClientApp()
"""


@dataclass
class Site:
    """A started site, its server, and the proxy between them."""

    folder: Path
    python: str
    server: PlainServer
    env: dict[str, str]
    proxy_log: Path
    users: tuple[SystemUser, SystemUser] | None

    def quorate(self, *arguments: str, code: int = 0) -> str:
        command = [self.python, "-P", "-c", "from quorate.deploy.cli import main; main()", *arguments]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=400)
        assert done.returncode == code, (
            f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.logs()}"
        )
        return done.stdout

    def pid(self, program: str) -> int | None:
        status = json.loads((self.folder / "state" / "supervisor" / "status.json").read_text())
        found: int | None = status["programs"][program]["pid"]
        return found

    def contact(self) -> str:
        content: dict[str, str] = json.loads(
            (self.folder / "state" / "supernode" / "contact.json").read_text()
        )
        return content["state"]

    def logs(self) -> str:
        return "\n".join(path.read_text()[-2000:] for path in (self.folder / "state" / "logs").glob("*.log"))


@contextlib.contextmanager
def two_users() -> Iterator[tuple[SystemUser, SystemUser] | None]:
    if os.geteuid() != 0 or shutil.which("useradd") is None:
        yield None
        return
    names = [f"q{role}{os.getpid()}" for role in ("site", "node")]
    try:
        for name in names:
            subprocess.run(["useradd", "--system", "--no-create-home", "--user-group", name], check=True)
        yield SystemUser.named(names[0]), SystemUser.named(names[1])
    finally:
        for name in names:
            subprocess.run(["userdel", name], capture_output=True)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="quorate-", dir="/tmp") as name, two_users() as users:
        folder = Path(name)
        folder.chmod(0o755)
        python = interpreter(folder / "venv", users) if users else None
        users = users if python else None
        (folder / "server").mkdir()
        server, proxy_port = PlainServer(folder / "server"), free_port()
        proxy = subprocess.Popen(
            [sys.executable, connect_proxy.__file__, str(proxy_port), str(folder / "proxy.log")]
        )
        env = {
            **os.environ,
            "HTTPS_PROXY": f"http://127.0.0.1:{proxy_port}",
            "HTTP_PROXY": "http://127.0.0.1:9",
        }
        north = folder / "north"
        north.mkdir()
        site = Site(north, python or sys.executable, server, env, folder / "proxy.log", users)
        try:
            server.start()
            (north / "notes.csv").write_text("text,label\n" + "fever,yes\nrash,no\n" * 10)
            (north / "site.yaml").write_text(
                "data: {notes: {source: notes.csv}}\n"
                + (f"users: {{site: {users[0].name}, supernode: {users[1].name}}}\n" if users else "")
            )
            # A name that the proxy alone resolves.
            (north / "connection.yaml").write_text(
                f"federation: f\nsite: north\nserver: quorate.test:{server.port}\n"
            )
            shutil.copy(folder / "server" / "ca.crt", north / "ca.crt")
            site.quorate("site", "enrol", str(north))
            server.register(north / "node.pub", "north")
            site.quorate("site", "start", str(north))
            yield site
            site.quorate("site", "stop", str(north))
        finally:
            with contextlib.suppress(FileNotFoundError, ValueError):
                os.kill(
                    json.loads((north / "state/supervisor/status.json").read_text())["pid"], signal.SIGTERM
                )
                time.sleep(5)
            server.stop()
            proxy.terminate()
            proxy.wait(10)


def test_the_connection_goes_through_the_proxy_and_loopback_does_not(site: Site) -> None:
    wait_until(lambda: site.contact() == "connected", 120, "connection through the proxy")
    asked = set(site.proxy_log.read_text().splitlines())
    assert asked == {f"CONNECT quorate.test:{site.server.port}"}
    found = json.loads(site.quorate("site", "check", str(site.folder), "--json"))
    assert {line["what"]: line["ok"] for line in found["checks"]}["server"], found
    assert "through the proxy 127.0.0.1" in str(found)


def test_our_bundle_reaches_the_site_process(site: Site) -> None:
    # The probe's message is none of ours: that the site process says so proves that it came all the way.
    assert site.server.probe(bundle_dir(), RUN) == {"nodes": 1, "answers": [[1001, "protocol"]]}


def test_a_changed_configuration_is_refused(site: Site) -> None:
    found = site.server.probe(bundle_dir(), 'run="../../north"')
    assert found["answers"] == [[1002, "bundle"]]
    assert "16 hexadecimal digits" in site.logs()


def test_code_in_a_bundle_never_runs(site: Site, tmp_path: Path) -> None:
    folder, marker = tmp_path / "quorate", site.folder / "state" / "supernode" / "ran"
    (folder / "client").mkdir(parents=True)
    project = (bundle_dir() / "pyproject.toml").read_text()
    (folder / "pyproject.toml").write_text(
        project.replace("quorate.client.process.flower_app:app", "client.app:app")
    )
    (folder / "client" / "__init__.py").touch()
    (folder / "client" / "app.py").write_text(HOSTILE.format(marker=str(marker)))
    assert site.server.probe(folder, RUN)["answers"] == [[1002, "bundle"]]
    assert not marker.exists()
    assert not list((site.folder / "state").rglob("client/app.py")), "it was not even written to disk"


def test_two_users_keep_data_from_flower(site: Site) -> None:
    if site.users is None:
        pytest.skip("needs root, useradd, and a Python that every user may run")
    own, supernode = site.users
    for program, user in (("site", own), ("supernode", supernode), ("superexec", supernode)):
        assert os.stat(f"/proc/{site.pid(program)}").st_uid == user.uid  # noqa: PTH116
    private = [site.folder / "notes.csv", site.folder / "site.yaml", site.folder / "state" / "answers.db"]
    assert reads(own, private) == [True, True, True]
    assert reads(supernode, private) == [False, False, False]
    assert reads(supernode, [site.folder, site.folder / "state"]) == [False, False], "not even names"
    keys = [site.folder / "node.key", site.folder / "state" / "supernode" / "superexec.secret"]
    assert reads(supernode, keys) == [True, True] and reads(own, keys) == [False, False]
    # The message of test_our_bundle_reaches_the_site_process came through this socket.
    about = (site.folder / "state" / "site.sock").stat()
    assert (about.st_uid, about.st_gid, about.st_mode & 0o777) == (own.uid, supernode.gid, 0o660)


def test_a_killed_supernode_comes_back(site: Site) -> None:
    before: Any = site.pid("supernode")
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: site.contact() == "refused", 120, "refusal while the old heartbeat is valid")
    wait_until(lambda: site.contact() == "connected", 240, "connection after it")
    assert site.pid("supernode") not in (before, None)
