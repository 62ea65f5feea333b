"""What people who run a federation read: logs, `status` and `check`, and a run that waits for their word.

One federation on loopback, with two sites; what is broken in a test is mended at its end.
"""

from __future__ import annotations

import json
import re
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from loopback import NAME, NEEDS_NGINX, Loopback, pin_model, wait_for
from small_disks import small_disk
from tiny_runs import LABELS

from quorate.shared.process.log_keeper import MAX_BYTES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), NEEDS_NGINX]
RUN = """
name: tiny
task: {name: sequence_classification, labels: [cardiac, hepatic, pulmonary], max_length: 24}
data: notes
model: {model_name_or_path: "MODEL", sha256: HASH}
adapter: {r: 4}
training: {max_steps: 2, per_device_train_batch_size: 4}
federation: {rounds: 1, quorum: 2}
evaluation: {bootstrap_samples: 20}
"""
TIMED = re.compile(r"\d{4}[-/]\d\d[-/]\d\d[ T]\d\d:\d\d:\d\d")
OLD = ("superlink", "nginx"), ("supernode", "site")
"""Logs, of the server and of north, that were full before all began."""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Iterator[Loopback]:
    folder = tmp_path_factory.mktemp("operations")
    lines = [f"{word} {n},{label}" for n in range(9) for label, own in LABELS.items() for word in own.split()]
    (folder / "notes.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    models = pin_model(folder, RUN, tiny_bert)
    data = {"notes": {"source": str(folder / "notes.csv")}}
    federation = Loopback(folder, {"north": data, "south": data}, models)
    federation.write_site(
        "north", {"data": data, "models": models, "device": "cpu", "policy": {"approve_each_run": True}}
    )
    for logs, names in zip(logs_of(federation), OLD, strict=True):
        logs.mkdir(parents=True, mode=0o700)
        for name in names:
            (logs / f"{name}.log").write_bytes(b"of an earlier release\n" * (MAX_BYTES // 22))
    with federation.running():
        yield federation


def logs_of(federation: Loopback) -> tuple[Path, Path]:
    return federation.home / "state" / "logs", federation.folder / "north" / "state" / "logs"


def server_status(federation: Loopback, code: int) -> dict[str, Any]:
    told = federation.quorate("server", "status", "--federation", NAME, "--json", code=code)
    return dict(json.loads(told.stdout))


def site(federation: Loopback, command: str, name: str, code: int) -> dict[str, Any]:
    return dict(json.loads(federation.quorate("site", command, name, "--json", code=code).stdout))


def wrong(found: dict[str, Any]) -> set[str]:
    """What is not right, of all that was looked at."""
    return {line["what"] for line in found["checks"] if not line["ok"]}


def test_all_is_green_where_nothing_is_broken(federation: Loopback) -> None:
    assert wrong(server_status(federation, 0)) == set()
    for name in federation.sites:
        assert wrong(site(federation, "status", name, 0)) == set()
        assert wrong(site(federation, "check", name, 0)) == set()


def test_a_run_waits_for_the_word_of_a_site(federation: Loopback) -> None:
    running = federation.run_in_background("run", "tiny.yaml", "--federation", NAME, "-o", "out")
    try:
        (run_id,) = wait_for(lambda: site(federation, "status", "north", 0)["waiting"], "nobody asked", 300)
        assert running.poll() is None
        federation.quorate("site", "approve", run_id, "--folder", "north")
        told, _ = running.communicate(timeout=400)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 0, f"{told}\n{federation.logs()}"
    (asked,) = [line for line in told.splitlines() if "waiting for approval" in line]
    assert "north" in asked and "south" not in asked and f"quorate site approve {run_id}" in asked
    summary = json.loads((federation.folder / "out" / "summary.json").read_text())
    assert set(summary["sites"]) == {"north", "south"}


def test_every_line_of_every_log_has_its_time_and_no_log_grows_for_ever(federation: Loopback) -> None:
    for logs, old in zip(logs_of(federation), OLD, strict=True):
        names = {path.stem for path in logs.glob("*.log")}
        assert names >= {"superexec", *old}
        for name in names:
            said = (logs / f"{name}.log").read_text()
            assert len(said) < MAX_BYTES // 2
            untimed = [line for line in said.splitlines() if not TIMED.match(line)]
            assert untimed == ["of an earlier release"] * len(untimed), f"{name}.log: {untimed[:5]}"
        for name in ("superlink", "supernode"):
            if name in old:
                assert (logs / f"{name}.log.1").read_text().startswith("of an earlier release\n")
                assert "of an earlier" not in (logs / f"{name}.log").read_text()
    assert "POST /v1/fleet/" not in (logs_of(federation)[0] / "superexec.log").read_text()


def shown_until(federation: Loopback) -> float:
    """When the certificate ends that the public port shows [Unix time]."""
    import socket

    context = ssl.create_default_context(cafile=str(federation.home / "ca" / "ca.crt"))
    with (
        socket.create_connection(("localhost", federation.port)) as connection,
        context.wrap_socket(connection, server_hostname="localhost") as secured,
    ):
        certificate = secured.getpeercert()
    assert certificate is not None
    return ssl.cert_time_to_seconds(str(certificate["notAfter"]))


def renew(federation: Loopback, days: int) -> None:
    federation.quorate("certificates", "renew", "--days", str(days), "--federation", NAME)
    wanted = time.time() + days * 86400
    wait_for(lambda: abs(shown_until(federation) - wanted) < 3600, "the server did not take it over")


def test_a_renewed_certificate_is_taken_over_and_one_at_its_end_is_shown_by_all(federation: Loopback) -> None:
    nginx = federation.pid("nginx")
    renew(federation, 2)
    try:
        assert wrong(server_status(federation, 1)) == {"server.crt"}
        for command in ("status", "check"):
            found = site(federation, command, "south", 1)
            assert wrong(found) == {"server certificate"}, found
    finally:
        renew(federation, 365)
    assert federation.pid("nginx") == nginx, "it was not even restarted"
    server_status(federation, 0)
    site(federation, "status", "south", 0)


def test_a_full_disk_is_shown_where_it_is(federation: Loopback) -> None:
    with ExitStack() as disks:
        disks.enter_context(small_disk(federation.folder / "south" / "anchor", 64 * 2**10))
        disks.enter_context(small_disk(federation.home / "state" / "runs", 2**20))
        assert wrong(server_status(federation, 1)) == {"disk"}
        for command in ("status", "check"):
            found = site(federation, command, "south", 1)
            assert wrong(found) == {"disk"}, found
        site(federation, "status", "north", 0)
    server_status(federation, 0)


def test_what_a_site_lost_is_shown_before_a_run_misses_it(federation: Loopback) -> None:
    path = federation.folder / "south" / "site.yaml"
    before = path.read_text()
    content = yaml.safe_load(before)
    content["models"][0]["path"] = str(federation.folder / "gone")
    content["data"]["notes"]["source"] = str(federation.folder / "gone.csv")
    try:
        path.write_text(yaml.safe_dump(content))
        assert wrong(site(federation, "status", "south", 1)) == {"models[0]", "data.notes"}
        assert wrong(site(federation, "check", "south", 2)) == {"models[0]", "data.notes"}
    finally:
        path.write_text(before)
    site(federation, "status", "south", 0)


def test_a_revoked_site_is_shown_as_such_at_both_ends(federation: Loopback) -> None:
    federation.quorate("certificates", "revoke", "south", "--federation", NAME)

    def out() -> bool:
        return site_contact(federation, "south") == "refused"

    wait_for(out, "the SuperNode was not refused", 240)
    found = server_status(federation, 0)  # nobody waits for it any more
    assert found["sites"]["south"]["state"] == "revoked" and found["sites"]["south"]["revoked"]
    assert "revoked 20" in federation.quorate("server", "status", "--federation", NAME).stdout
    assert site(federation, "status", "south", 1)["server"]["state"] == "refused"
    assert wrong(site(federation, "check", "south", 1)) == {"admission"}
    assert wrong(site(federation, "check", "north", 0)) == set()
    federation.quorate("site", "stop", "north")
    wait_for(lambda: server_states(federation)["north"] == "offline", "it is online still", 120)
    assert wrong(server_status(federation, 1)) == {"site north"}


def site_contact(federation: Loopback, name: str) -> str:
    path = federation.folder / name / "state" / "supernode" / "contact.json"
    return str(json.loads(path.read_text())["state"])


def server_states(federation: Loopback) -> dict[str, str]:
    command = federation.run_in_background("server", "status", "--federation", NAME, "--json")
    told, _ = command.communicate(timeout=120)
    return {name: each["state"] for name, each in json.loads(told)["sites"].items()}
