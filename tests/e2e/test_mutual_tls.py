"""Mutual TLS end to end: every SuperNode through its forwarder, certificate and node key pinned together."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from loopback import NAME, NEEDS_NGINX, Loopback, pin_model, wait_for
from tiny_runs import LABELS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), NEEDS_NGINX]
RUN = """
name: tiny
task: {name: sequence_classification, labels: [cardiac, hepatic, pulmonary], max_length: 24}
data: notes
model: {model_name_or_path: "MODEL", sha256: HASH}
adapter: {r: 4}
training: {max_steps: 4, per_device_train_batch_size: 4, learning_rate: 1e-1, max_stack: 1}
federation: {rounds: 2, quorum: 2, grace_seconds: 0}
evaluation: {bootstrap_samples: 20}
"""
NAMES = ("east", "north")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Iterator[Loopback]:
    """A federation of two sites that asks for client certificates, and its run file."""
    folder = tmp_path_factory.mktemp("mutual")
    for name in NAMES:
        rows = [f"{name} {words} {n},{label}" for n in range(12) for label, words in LABELS.items()]
        (folder / f"{name}.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    models = pin_model(folder, RUN, tiny_bert)
    sites = {"sites": [{"name": name, "source": f"{name}.csv"} for name in NAMES]}
    (folder / "tiny.sites.yaml").write_text(yaml.safe_dump({"data": {"notes": sites}}))
    loopback = Loopback(
        folder,
        {name: {"notes": {"source": str(folder / f"{name}.csv")}} for name in NAMES},
        models,
        server={"mutual_tls": True},
    )
    with loopback.running():
        yield loopback


def site_status(federation: Loopback, site: str) -> dict[str, Any]:
    """What `quorate site status` tells of a site, whichever exit code it ends with."""
    connected = contact(federation, site) == "connected"
    told = federation.quorate("site", "status", site, "--json", code=0 if connected else 1)
    return dict(json.loads(told.stdout))


def contact(federation: Loopback, site: str) -> str:
    """How the SuperNode of a site stands with the server, in its own words."""
    path = federation.folder / site / "state" / "supernode" / "contact.json"
    return str(json.loads(path.read_text())["state"])


def refusals(federation: Loopback) -> list[str]:
    """Lines of the server's nginx on requests of a certificate with another site's key."""
    log = (federation.home / "state" / "logs" / "nginx.log").read_text()
    return [line for line in log.splitlines() if re.search(r" 403 POST ", line)]


def test_a_run_through_the_forwarders_ends_where_its_simulation_ends(federation: Loopback) -> None:
    federation.quorate("simulate", "tiny.yaml", "-o", "simulated")
    ended = federation.quorate("run", "tiny.yaml", "--federation", NAME, "-o", "run")
    assert "round 2/2" in ended.stderr and "2 of 2 sites" in ended.stderr
    adapter = Path("adapter", "adapter_model.safetensors")
    expected = (federation.folder / "simulated" / adapter).read_bytes()
    assert (federation.folder / "run" / adapter).read_bytes() == expected
    for name in NAMES:
        (received,) = (federation.folder / name / "state" / "received").iterdir()
        assert (received / adapter).read_bytes() == expected
        assert site_status(federation, name)["programs"]["forward"]["pid"] == federation.pid("forward", name)
    assert refusals(federation) == []


def test_a_forwarder_that_is_killed_comes_back(federation: Loopback) -> None:
    killed = federation.pid("forward", "north")
    federation.kill("forward", "north")
    wait_for(lambda: federation.pid("forward", "north") not in (None, killed), "no forwarder")
    ended = federation.quorate("run", "tiny.yaml", "--federation", NAME, "-o", "after a kill")
    assert "2 of 2 sites" in ended.stderr


def test_a_certificate_is_no_good_with_the_key_of_another_site(federation: Loopback) -> None:
    east, north = federation.folder / "east", federation.folder / "north"
    own = {name: (north / name).read_bytes() for name in ("client.crt", "client.key")}
    federation.quorate("site", "stop", "north")
    for name in own:
        shutil.copy(east / name, north / name)
    federation.quorate("site", "start", "north")
    wait_for(lambda: contact(federation, "north") == "refused", "the SuperNode was not refused")
    status = site_status(federation, "north")
    assert status["server"]["detail"] == "HTTP 403"
    assert all(
        program["problem"] is None for program in status["programs"].values()
    )  # it asks again for ever
    assert refusals(federation) and all(re.search(r"CN=east\b", line) for line in refusals(federation))
    assert site_status(federation, "east")["ok"]
    told = federation.quorate("server", "status", "--federation", NAME, "--json", code=1)
    server = json.loads(told.stdout)
    assert [each["what"] for each in server["checks"] if not each["ok"]] == ["site north"]
    assert {name: server["sites"][name]["state"] for name in NAMES} == {"east": "online", "north": "offline"}
    found = json.loads(federation.quorate("site", "check", "north", "--json", code=2).stdout)
    (line,) = [line for line in found["checks"] if line["what"] == "client.crt"]
    assert not line["ok"] and f"is that of quorate:{NAME}/east" in line["found"], line

    federation.quorate("site", "stop", "north")
    for name, content in own.items():
        (north / name).write_bytes(content)
    federation.quorate("site", "start", "north")
    wait_for(lambda: contact(federation, "north") == "connected", "not connected with its own again", 240)
