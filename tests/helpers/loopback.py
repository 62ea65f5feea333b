"""A whole federation on loopback: real certificates, nginx, SuperLink, SuperNodes and site processes.

Everything goes through the commands that people type; only site.yaml is written by hand, as at a site.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from federations import unpack_kit

from quorate.client.data.placement import Placement

NAME = "clinic"
NEEDS_NGINX = pytest.mark.skipif(
    shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin") is None,
    reason="nginx is not installed",
)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on at the moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def place_as_simulated(site: Path) -> None:
    """Give a site the key of a simulation's splits, so that both train on the same rows."""
    place = site / "state" / "splits"
    place.mkdir(mode=0o700, parents=True)
    (site / "state").chmod(0o750)
    (place / "key").write_bytes(Placement.of_seed(0).key)
    (place / "key").chmod(0o600)


class Loopback:
    """A provisioned federation.

    Args:
        folder: everything is made in it.
        data: site -> `data:` section of its site.yaml.
        models: `models:` section of every site.yaml.
        env: further environment variables.
        site: further sections of every site.yaml, such as `policy`.
        server: further fields of `server:` in federation.yaml.
    """

    def __init__(
        self,
        folder: Path,
        data: Mapping[str, Any],
        models: list[dict[str, str]],
        *,
        env: Mapping[str, str] | None = None,
        site: Mapping[str, Any] | None = None,
        server: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.sites = sorted(data)
        self.env = {
            **os.environ,
            "QUORATE_HOME": str(folder / "home"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            **(env or {}),
        }
        self.port, superlink, health = free_ports(3)
        ports = {"port": self.port, "superlink_port": superlink, "health_port": health}
        fields = {"hostname": "localhost", "addresses": ["127.0.0.1"], "listen": "127.0.0.1", **ports}
        fields |= server or {}
        federation = {"name": NAME, "server": fields, "sites": self.sites}
        (folder / "federation.yaml").write_text(yaml.safe_dump(federation))
        self.quorate("provision", "federation.yaml")
        self.home = folder / "home" / NAME
        for name in self.sites:
            unpack_kit(self.home / "sites" / name / "kit.tar", folder)
            content = {"data": data[name], "models": models, "device": "cpu", **(site or {})}
            self.write_site(name, content)
            self.quorate("site", "enrol", name)
            place_as_simulated(folder / name)
            self.quorate("server", "admit", name, f"{name}/node.pub", "--federation", NAME)
            if fields.get("mutual_tls"):
                self.quorate("certificates", "sign", name, f"{name}/client.csr", "--federation", NAME)
                shutil.copy(self.home / "sites" / name / "client.crt", folder / name)

    def write_site(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a site's own file."""
        (self.folder / name / "site.yaml").write_text(yaml.safe_dump(dict(content)))

    def quorate(
        self, *arguments: str, code: int = 0, timeout: float = 900
    ) -> subprocess.CompletedProcess[str]:
        """Run one command as a person would, and hold it to its exit code."""
        ended = subprocess.run(
            [str(Path(sys.executable).with_name("quorate")), *arguments],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert ended.returncode == code, (
            f"quorate {' '.join(arguments)}: {ended.returncode}\n{ended.stdout}\n{ended.stderr}\n"
            f"{self.logs()}"
        )
        return ended

    def run_in_background(self, *arguments: str) -> subprocess.Popen[str]:
        """Start one command and come back at once."""
        return subprocess.Popen(
            [str(Path(sys.executable).with_name("quorate")), *arguments],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def start(self) -> None:
        """Start the server, then every site."""
        self.quorate("server", "start", "--federation", NAME)
        for name in self.sites:
            self.quorate("site", "start", name)

    @contextmanager
    def running(self) -> Iterator[Loopback]:
        """Run while the block does; afterwards no process is left."""
        try:
            self.start()
            yield self
        finally:
            self.stop()
            left = processes("", f"QUORATE_HOME={self.folder / 'home'}")
            assert not left, f"processes are left over: {left}"

    def stop(self) -> None:
        """Stop every site, then the server."""
        for name in self.sites:
            self.quorate("site", "stop", name)
        self.quorate("server", "stop", "--federation", NAME)

    def pid(self, program: str, site: str | None = None) -> int | None:
        """Process id of a supervised program, of the server or of a site; None while it is down."""
        folder = self.folder / site / "state" / "supervisor" if site else self.home / "state"
        try:
            status = json.loads((folder / "status.json").read_text())
        except FileNotFoundError:
            return None
        found = status["programs"].get(program, {}).get("pid")
        return int(found) if found else None

    def kill(self, program: str, site: str | None = None) -> None:
        """kill -9 a supervised program, as soon as it runs."""
        pid = wait_for(lambda: self.pid(program, site), f"no {program} to kill")
        os.kill(pid, signal.SIGKILL)

    def logs(self) -> str:
        """The ends of all log files, for a failing test."""
        tails = []
        for path in sorted(self.folder.rglob("*.log")):
            if path.is_file():
                tails.append(
                    f"--- {path.relative_to(self.folder)}\n{path.read_text(errors='replace')[-3000:]}"
                )
        return "\n".join(tails)


def pin_model(folder: Path, run: str, model: Path) -> list[dict[str, str]]:
    """Write tiny.yaml with MODEL and HASH filled in; return the `models:` section of a site that holds it."""
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    (folder / "tiny.yaml").write_text(run.replace("MODEL", str(model)).replace("HASH", digest))
    return [{"path": str(model), "sha256": digest}]


def wait_for(found: Callable[[], Any], otherwise: str, seconds: float = 120) -> Any:
    """Return the first true thing that `found` gives."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)
    return value


def processes(pattern: str, environment: str) -> list[int]:
    """Process ids whose command line holds `pattern` and whose environment holds `environment`."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            variables = (folder / "environ").read_bytes().decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if pattern in command and environment in variables:
            found.append(int(folder.name))
    return found
