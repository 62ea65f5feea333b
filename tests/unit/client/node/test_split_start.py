"""The two halves of a site, started apart: what each of them needs, and what it must not."""

import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from other_users import interpreter
from refusals import refuses
from site_folder import write_folder

from quorate.client.health.site_check import _models_are_readable
from quorate.client.node.enrolment import enrol
from quorate.client.node.names import SOCKET
from quorate.client.node.split_start import NodeFolder, supernode_programs
from quorate.client.node.users import SystemUser
from quorate.shared.errors import ConfigError, ModelError
from quorate.shared.process.supervised import read_status

CONNECTION = {"federation": "lungs", "site": "north", "server": "127.0.0.1:9", "mutual_tls": False}


@pytest.fixture
def node(tmp_path: Path) -> NodeFolder:
    """What the SuperNode's container sees: no site.yaml, no data."""
    (tmp_path / "connection.yaml").write_text(yaml.safe_dump(CONNECTION))
    (tmp_path / "ca.crt").write_text("read by Flower alone")
    enrol(tmp_path)
    return NodeFolder(tmp_path)


def test_the_supernode_needs_neither_site_yaml_nor_data(
    node: NodeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SOCKET, "/run/quorate/site.sock")
    supernode, superexec = supernode_programs(node)
    for program in (supernode, superexec):
        assert program.env[SOCKET] == "/run/quorate/site.sock"
        assert program.env["PATH"] == str(node.bin)
        assert program.user is None
        assert program.log.is_relative_to(node.supernode)
    assert (node.bin / "flwr-clientapp").is_file()
    for folder in (node.supernode, node.logs, node.supervisor):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_without_the_variable_the_socket_is_in_state(
    node: NodeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SOCKET, raising=False)
    assert node.socket == node.path / "state" / "site.sock"


def test_without_a_key_it_does_not_start(node: NodeFolder) -> None:
    node.node_key.unlink()
    with pytest.raises(ConfigError) as caught:
        supernode_programs(node)
    assert all(
        fact in str(caught.value) for fact in (str(node.node_key), f"`quorate site enrol {node.path}`")
    )


def users() -> tuple[str, str]:
    """Two ordinary users that every Debian has, with groups of their own."""
    if os.geteuid() != 0:
        pytest.skip("only root can become other users")
    names = [
        each for each in ("daemon", "games", "mail", "bin") if each in {u.pw_name for u in pwd.getpwall()}
    ]
    if len(names) < 2:
        pytest.skip("this machine has no two spare users")
    return names[0], names[1]


@pytest.fixture
def python() -> Iterator[list[str]]:
    """The start of a command line that runs a Python which these users may run."""
    own, other = users()
    with tempfile.TemporaryDirectory(prefix="quorate-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        found = interpreter(Path(name) / "venv", (SystemUser.named(own), SystemUser.named(other)))
        if found is None:
            pytest.skip("there is no Python here that other users may run, or the checkout is not for them")
        yield [found, "-P"]


def as_user(name: str, *command: str) -> list[str]:
    return ["setpriv", "--reuid", name, "--regid", name, "--clear-groups", *command]


def test_a_base_model_that_the_sites_user_cannot_read_is_said(tiny_bert: Path) -> None:
    own = SystemUser.named(users()[0])
    with tempfile.TemporaryDirectory(prefix="quorate-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        model = Path(name) / "model"
        shutil.copytree(tiny_bert, model)
        site = write_folder(Path(name) / "north", model)
        for mode in (0o700, 0o755):
            model.chmod(mode)
            for each in model.iterdir():
                each.chmod(mode & 0o666)
            if mode == 0o755:
                _models_are_readable(site, own)
            else:
                with refuses(ModelError, where="models") as caught:
                    _models_are_readable(site, own)
                assert own.name in str(caught.value) and f"chmod -R a+rX {model}" in str(caught.value)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_users_share_the_socket_alone(python: list[str]) -> None:
    own, other = users()
    cli = "from quorate.deploy.site_cli import main; main()"
    folder = Path("/srv") / f"quorate-apart-{os.getpid()}"  # pytest's own folders are root's alone
    folder.mkdir()
    (folder / "connection.yaml").write_text(yaml.safe_dump(CONNECTION))
    (folder / "ca.crt").write_text("read by Flower alone")
    (folder / "notes.csv").write_text("text,label\nsecret,yes\n")
    site_yaml = {"data": {"notes": {"source": "notes.csv"}}, "users": {"site": own, "supernode": other}}
    (folder / "site.yaml").write_text(yaml.safe_dump({**site_yaml, "device": "cpu"}))
    enrol(folder)
    started = []
    try:
        subprocess.run([*python, "-c", cli, "site", "prepare", folder], check=True)
        for half, user in (("site", own), ("supernode", other)):
            command = as_user(
                user, *python, "-c", cli, "site", "start", "--foreground", "--only", half, str(folder)
            )
            isolated = ["unshare", "--net"] if half == "site" else []  # as PrivateNetwork=yes
            started.append(subprocess.Popen([*isolated, *command]))
        node, deadline = NodeFolder(folder), time.monotonic() + 400
        health = (
            "import sys; from pathlib import Path; "
            "from quorate.client.process.grpc_server import check_health; "
            "sys.exit(not check_health(Path(sys.argv[1])))"
        )
        socket = str(folder / "state" / "site.sock")
        while True:
            status = read_status(node.supervisor)
            up = (
                Path(socket).exists()
                and status is not None
                and all(each.pid for each in status.programs.values())
            )
            if up and not subprocess.run(as_user(other, *python, "-c", health, socket)).returncode:
                break
            assert all(each.poll() is None for each in started), "a half has ended"
            assert time.monotonic() < deadline, "the halves did not come up"
            time.sleep(2)

        def readable(user: str, path: str) -> bool:
            return not subprocess.run(
                as_user(user, "cat", str(folder / path)), capture_output=True
            ).returncode

        assert readable(own, "notes.csv") and not readable(other, "notes.csv")
        assert readable(own, "site.yaml") and not readable(other, "site.yaml")
        assert readable(other, "node.key") and not readable(own, "node.key")
        assert not readable(other, "state/answers.db")
    finally:
        for each in started:
            each.send_signal(signal.SIGTERM)
        codes = [each.wait(60) for each in started]
        subprocess.run(["rm", "-rf", folder], check=True)
    assert codes == [0, 0]
