"""A plain Flower server on loopback, whose ServerApp is a probe: it asks every node once and notes what came.

Not our server: the site's guard must hold against any. Certificates and keys are real, made here.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
_FLOWER = "import sys; sys.argv[0] = {name!r}; from {module} import {function} as f; f()"
_PROBE = """
import importlib, json, os, sys, time
sys.argv[0] = "flwr-serverapp"
from flwr.app import Message
from quorate.client.process.flower_messages import wrap
def probe(grid, server_app_dir, server_app_attr, context):
    wanted, deadline = int(os.environ["PROBE_NODES"]), time.monotonic() + 240
    while len(nodes := list(grid.get_node_ids())) < wanted and time.monotonic() < deadline:
        time.sleep(0.5)
    ids = set(grid.push_messages(
        [Message(wrap(b"probe"), message_type="query", dst_node_id=n, ttl=300) for n in nodes]
    ))
    answers = []
    while ids and time.monotonic() < deadline:
        for reply in grid.pull_messages(list(ids)):
            ids.discard(reply.metadata.reply_to_message_id)
            answers.append([reply.error.code, reply.error.reason] if reply.has_error() else "content")
        time.sleep(0.5)
    out = os.environ["PROBE_OUT"] + "/" + str(context.run_id)
    with open(out + ".part", "w") as file:
        json.dump({"nodes": len(nodes), "answers": answers}, file)
    os.rename(out + ".part", out)
    return context
runtime = importlib.import_module("flwr.superlink.runtime.run_serverapp")
runtime.run_ = probe
from flwr.superlink.cli import flwr_serverapp
flwr_serverapp()
"""
# `flwr run` without its checks of the bundle, which whoever means ill leaves out as well.
_SUBMIT = """
import hashlib, sys
from pathlib import Path
from flwr.cli.build import build_fab_from_disk
from flwr.cli.flower_config import read_superlink_connection
from flwr.cli.utils import init_http_client_from_connection
from flwr.common.config import parse_config_args
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.supercore.fab import Fab
built = build_fab_from_disk(Path(sys.argv[1]))
client = init_http_client_from_connection(read_superlink_connection("trial"))
print(client.StartRun(StartRunRequest(
    fab=fab_to_proto(Fab(hashlib.sha256(built).hexdigest(), built, {})),
    override_config=user_config_to_proto(parse_config_args([sys.argv[2]])),
)).run_id)
"""


def flower(module: str, function: str, name: str, *arguments: str) -> list[str]:
    """The command line of one of Flower's programs, wherever its scripts are installed."""
    code = _FLOWER.format(name=name, module=module, function=function)
    return [sys.executable, "-P", "-c", code, *arguments]


def free_port() -> int:
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return int(each.getsockname()[1])


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.2)
    return result


def make_certificates(folder: Path, days: float = 60, mutual: bool = False) -> None:
    """ca.crt, ca.key, server.crt, server.key for 127.0.0.1 and localhost; mutual: client.crt and .key."""
    now = datetime.datetime.now(datetime.UTC)

    def build(name: str, key: Any, issuer: str, signer: Any, ca: bool) -> x509.Certificate:
        names = [
            x509.DNSName("localhost"),
            x509.DNSName("quorate.test"),
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        ]
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=3))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if not ca:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(signer, hashes.SHA256())

    authority = ec.generate_private_key(ec.SECP256R1())
    _write(folder / "ca", authority, build("CA", authority, "CA", authority, True))
    for name in ("server", "client") if mutual else ("server",):
        key = ec.generate_private_key(ec.SECP256R1())
        _write(folder / name, key, build(name, key, "CA", authority, False))


def _write(stem: Path, key: Any, certificate: x509.Certificate) -> None:
    pem = serialization.Encoding.PEM
    stem.with_suffix(".crt").write_bytes(certificate.public_bytes(pem))
    stem.with_suffix(".key").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def make_node_key(folder: Path) -> None:
    """node.key and node.pub, as `quorate site enrol` makes them."""
    key = ec.generate_private_key(ec.SECP384R1())
    (folder / "node.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
    )
    (folder / "node.key").chmod(0o600)
    (folder / "node.pub").write_bytes(
        key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    )


@dataclass
class PlainServer:
    """SuperLink with TLS and node authentication, its superexec, and the probe as its ServerApp."""

    folder: Path
    port: int = field(default_factory=free_port)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        make_certificates(self.folder)
        (self.folder / "secret").write_bytes(os.urandom(32))
        (self.folder / "bin").mkdir()
        (self.folder / "probes").mkdir()
        (self.folder / "home").mkdir()
        probe = self.folder / "bin" / "flwr-serverapp"
        (self.folder / "probe.py").write_text(_PROBE)
        command = f"exec {shlex.quote(sys.executable)} -P {shlex.quote(str(self.folder / 'probe.py'))}"
        probe.write_text(f'#!/bin/sh\n{command} "$@"\n')
        probe.chmod(0o755)
        (self.folder / "home" / "config.toml").write_text(
            f'[superlink.trial]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{self.folder / "ca.crt"}"\n'
        )
        tls = [f"--ssl-{name}={self.folder / file}" for name, file in _TLS.items()]
        secret = ["--superexec-auth-secret-file", str(self.folder / "secret")]
        where = ["--host", "127.0.0.1", "--port", str(self.port)]
        superlink = [*where, *tls, "--enable-supernode-auth", "--isolation", "process", *secret]
        superlink += ["--disable-runtime-dependency-installation"]
        self.spawn(flower("flwr.superlink.cli", "flower_superlink", "flower-superlink", *superlink))
        wait_until(self.listening, 240, "SuperLink listening")
        superexec = ["--runtime-api-address", f"127.0.0.1:{self.port}", *secret]
        superexec += ["--root-certificates", str(self.folder / "ca.crt")]
        self.spawn(flower("flwr.supercore.cli", "flower_superexec", "flower-superexec", *superexec))

    def spawn(self, command: Sequence[str]) -> None:
        with (self.folder / "server.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)
        self.processes.append(process)

    @property
    def environment(self) -> dict[str, str]:
        own = {"FLWR_HOME": str(self.folder / "home"), "PROBE_OUT": str(self.folder / "probes")}
        return {
            **os.environ,
            **QUIET,
            **own,
            "PROBE_NODES": "1",
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
        }

    def listening(self) -> bool:
        assert self.processes[0].poll() is None, (self.folder / "server.log").read_text()[-3000:]
        with socket.socket() as each:
            return each.connect_ex(("127.0.0.1", self.port)) == 0

    def flwr(self, *arguments: str) -> str:
        return self.call(flower("flwr.cli.app", "app", "flwr", *arguments))

    def call(self, command: Sequence[str]) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def register(self, public_key: Path, name: str) -> None:
        self.flwr("supernode", "register", str(public_key), "trial", "--name", name)

    def probe(self, app: Path, overrides: str) -> dict[str, Any]:
        """Run a bundle; returns how many nodes there were, and what each of them answered."""
        run_id = self.call([sys.executable, "-P", "-c", _SUBMIT, str(app), overrides]).split()[-1]
        result = self.folder / "probes" / run_id
        wait_until(result.exists, 280, f"the probe of {app}")
        content: dict[str, Any] = json.loads(result.read_text())
        return content

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            process.wait(60)


_TLS = {"ca-certfile": "ca.crt", "certfile": "server.crt", "keyfile": "server.key"}
