"""A real federation on loopback: nginx, SuperLink, SuperExec, SuperNodes and site processes.

It must end where the simulation of the same run file ends, byte for byte, whichever process is killed.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from loopback import NAME, NEEDS_NGINX, Loopback, pin_model, processes, wait_for
from process_list import ProcessList, secrets_in
from tiny_runs import LABELS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400), NEEDS_NGINX]
RUN = """
name: tiny
task: {name: sequence_classification, labels: [cardiac, hepatic, pulmonary], max_length: 24}
data: notes
model: {model_name_or_path: "MODEL", sha256: HASH}
adapter: {r: 4, lora_dropout: 0.1}
training: {max_steps: 12, per_device_train_batch_size: 4, learning_rate: 1e-1, lr_scheduler_type: cosine,
           max_stack: 1}
federation: {rounds: 3, quorum: 3, grace_seconds: 0}
evaluation: {bootstrap_samples: 20}
"""
NAMES = ("east", "north", "south")


def write_rows(path: Path, seed: int) -> None:
    words = " ".join(LABELS.values()).split()
    lines = [
        f"{words[(7 * n + seed) % 9]} {own.split()[(n + seed) % 3]} {words[3 * n % 9]},{label}"
        for n in range(24)
        for label, own in LABELS.items()
    ]
    path.write_text("text,label\n" + "\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Iterator[Loopback]:
    """A federation of three sites that runs, and the run file."""
    folder = tmp_path_factory.mktemp("federation")
    for seed, name in enumerate(NAMES):
        write_rows(folder / f"{name}.csv", seed)
    models = pin_model(folder, RUN, tiny_bert)
    sites = {"sites": [{"name": name, "source": f"{name}.csv"} for name in NAMES]}
    (folder / "tiny.sites.yaml").write_text(yaml.safe_dump({"data": {"notes": sites}}))
    loopback = Loopback(
        folder,
        {name: {"notes": {"source": str(folder / f"{name}.csv")}} for name in NAMES},
        models,
    )
    with loopback.running():
        yield loopback


@pytest.fixture(scope="module")
def simulated(federation: Loopback) -> dict[str, bytes]:
    """What a simulation of the run file writes."""
    federation.quorate("simulate", "tiny.yaml", "-o", "simulated")
    return outcome(federation.folder / "simulated")


def outcome(out: Path) -> dict[str, Any]:
    """Of a run's folder, what neither the clock nor the run's id decides."""
    metrics = [json.loads(line)["validation"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    adapter = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    return {"adapter": adapter, "metrics": metrics, "run": (out / "run.yaml").read_bytes()}


def test_a_federation_ends_where_its_simulation_ends(federation: Loopback, simulated: dict[str, Any]) -> None:
    ended = federation.quorate("run", "tiny.yaml", "--federation", NAME, "-o", "undisturbed")
    assert outcome(federation.folder / "undisturbed") == simulated
    assert "round 3/3" in ended.stderr and "3 of 3 sites" in ended.stderr
    for name in NAMES:
        (received,) = (federation.folder / name / "state" / "received").iterdir()
        adapter = received / "adapter" / "adapter_model.safetensors"
        assert adapter.read_bytes() == simulated["adapter"]
        log = "\n".join(path.read_text() for path in (federation.folder / name / "state").rglob("*.log"))
        assert log.count("base model") == 1  # loaded once, for any number of messages
    assert (federation.folder / "undisturbed" / "report.html").stat().st_size > 10_000


def test_no_secret_stands_in_the_process_list(federation: Loopback) -> None:
    once = (federation.folder / "tiny.yaml").read_text().replace("rounds: 3", "rounds: 1")
    (federation.folder / "once.yaml").write_text(once)
    with ProcessList(federation.folder).watched() as seen:
        federation.quorate("run", "once.yaml", "--federation", NAME, "-o", "watched")
    held = secrets_in(federation.folder)
    assert len(held) > 20  # keys of the authority, of nginx, of every site, and what each SuperExec has
    for name in ("flwr-serverapp", "quorate.client.flower.bundle_guard_main"):
        tokens = [token for token, lines in seen.tokens.items() if any(name in line for line in lines)]
        assert tokens and all(len(token) == 256 for token in tokens), sorted(seen.arguments)
    assert seen.looks > 100 and not seen.found(held)


def in_round(federation: Loopback, known: set[str], round: int, phase: str) -> Path | None:
    """The folder of the new run, once it is in this phase of this round."""
    for run_dir in sorted((federation.home / "state" / "runs").iterdir()):
        events = run_dir / "events.jsonl"
        if run_dir.name in known or not events.exists():
            continue
        for line in events.read_text().splitlines():
            event = json.loads(line)
            if (event["event"], event.get("round"), event.get("phase", event.get("name"))) == (
                "phase",
                round,
                phase,
            ):
                return run_dir
    return None


def kill_client_app(federation: Loopback) -> None:
    """The process that Flower starts for one message."""
    pattern = "quorate.client.flower.bundle_guard_main"
    pids = wait_for(lambda: processes(pattern, str(federation.folder / "north")), "no ClientApp to kill")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def kill_server_app(federation: Loopback) -> None:
    pids = wait_for(
        lambda: processes("flwr-serverapp", f"QUORATE_FEDERATION={federation.home}"), "no ServerApp to kill"
    )
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


KILLS: dict[str, tuple[str, Callable[[Loopback], None]]] = {
    "site process": ("train", lambda federation: federation.kill("site", "north")),
    "SuperNode": ("train", lambda federation: federation.kill("supernode", "south")),
    "ClientApp": ("train", kill_client_app),
    "nginx": ("train", lambda federation: federation.kill("nginx")),
    "SuperExec": ("evaluate", lambda federation: federation.kill("superexec")),
    "SuperLink": ("evaluate", lambda federation: federation.kill("superlink")),
    "ServerApp": ("evaluate", kill_server_app),
}


@pytest.mark.parametrize("victim", KILLS)
def test_killed_anywhere_it_ends_where_it_would_have_ended(
    federation: Loopback, simulated: dict[str, Any], victim: str
) -> None:
    phase, kill = KILLS[victim]
    known = {path.name for path in (federation.home / "state" / "runs").glob("*")}
    out = f"killed {victim}"
    running = federation.run_in_background("run", "tiny.yaml", "--federation", NAME, "-o", out)
    try:
        wait_for(lambda: in_round(federation, known, 2, phase), f"no round 2\n{federation.logs()}", 300)
        kill(federation)
        said, _ = running.communicate(timeout=900)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 0, f"{said}\n{federation.logs()}"
    assert outcome(federation.folder / out) == simulated
