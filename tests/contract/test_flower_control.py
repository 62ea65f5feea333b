"""The control side of Flower against a real SuperLink: what its command says, and that we understand it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from refusals import refuses

from quorate.deploy.control.flower_cli import ControlError, Flower, ServerNotUp
from quorate.deploy.environment import prepare_environment
from quorate.shared.protocol.bundle import bundle_dir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RUN = "0123456789abcdef"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_run_is_submitted_watched_stopped_and_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ)
    prepare_environment()
    port = free_port()
    home = tmp_path / "flower"
    flower = Flower(home, "trial")
    with refuses(ServerNotUp, "server-never-started") as caught:
        flower.submit(bundle_dir(), RUN)
    assert "`quorate server start`" in str(caught.value)
    home.mkdir()
    (home / "config.toml").write_text(f'[superlink.trial]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    with refuses(ServerNotUp, "server-silent"):
        flower.submit(bundle_dir(), RUN)

    secret = tmp_path / "secret"
    secret.write_text("s" * 32)
    command = [sys.executable, "-c", "from flwr.superlink.cli import flower_superlink; flower_superlink()"]
    command += ["--insecure", "--host", "127.0.0.1", "--port", str(port), "--isolation", "process"]
    command += ["--superexec-auth-secret-file", str(secret), "--disable-runtime-dependency-installation"]
    with (tmp_path / "superlink.log").open("wb") as log:
        superlink = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "FLWR_HOME": str(home)}
        )
    try:
        for _ in range(240):
            try:
                httpx.get(f"http://127.0.0.1:{port}/")
                break
            except httpx.TransportError:
                assert superlink.poll() is None, (tmp_path / "superlink.log").read_text()
                time.sleep(0.5)
        number = flower.submit(bundle_dir(), RUN)
        assert flower.state(number) == "pending"  # nobody is there to carry it out
        flower.stop(number)
        assert flower.state(number) == "stopped"
        flower.stop(number)  # once more does no harm
        assert flower.state(number + 1) == "unknown"
        with pytest.raises(ControlError) as refused:
            flower.submit(tmp_path, RUN)  # no bundle
        assert type(refused.value) is ControlError and "`flwr run`" in str(refused.value)
    finally:
        superlink.send_signal(signal.SIGTERM)
        superlink.wait(60)
