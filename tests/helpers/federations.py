"""Federations' folders for tests: made by the code that makes real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from quorate.client.node.enrolment import enrol
from quorate.deploy.provision.authority import Authority
from quorate.deploy.provision.provisioning import provision
from quorate.server.federation.folder import FederationFolder
from quorate.shared.config.dialect import write_mapping

SITES = ("north", "south")
_COUNTED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod")


def write_config(folder: Path, *sites: str, name: str = "lungs", **server: object) -> Path:
    """Write a federation.yaml; returns its path."""
    path = folder / "federation.yaml"
    fields = {"hostname": "server.example", "addresses": ["192.0.2.17", "2001:db8::1"], **server}
    path.write_text(write_mapping({"name": name, "server": fields, "sites": list(sites or SITES)}))
    return path


def make(folder: Path, *sites: str, **server: object) -> tuple[FederationFolder, Authority]:
    """Provision a federation in `folder`/home."""
    done = provision(write_config(folder, *sites, **server), folder / "home")
    return done.folder, Authority(done.folder, done.config.name)


def unpack_kit(kit: Path, to: Path) -> None:
    """Unpack a start-up kit as its README says."""
    to.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", "-xf", str(kit), "-C", str(to)], check=True)


def join(folder: FederationFolder, site: str, to: Path) -> Path:
    """Unpack a site's kit under `to`, as the site does, and make its keys; returns the site's folder."""
    unpack_kit(folder.site(site) / "kit.tar", to)
    enrol(to / site)
    return to / site


def content(folder: Path) -> dict[str, bytes]:
    """Every file under a folder: relative path -> bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def kill_at(action: Callable[[], object], folder: Path, nth: int) -> bool:
    """Run `action` in a forked process that is killed (-9) before its nth operation on a file in `folder`.

    Returns: whether it was killed; False: it ended before, and well.
    """
    child = os.fork()
    if child == 0:
        _count_and_kill(folder, nth)
        try:
            action()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def _count_and_kill(folder: Path, nth: int) -> None:
    left = nth
    inside = str(folder)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event not in _COUNTED or not any(inside in str(each) for each in arguments):
            return
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
