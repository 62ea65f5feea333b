"""The server's SuperExec or supervisor is killed in the middle of rounds, and the run goes on each time.

QUORATE_KILLS=50 kills as often; QUORATE_KILLS_LOG names a file that each try is written to.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import NAME, NEEDS_NGINX, Loopback, pin_model, wait_for
from tiny_runs import LABELS

KILLS = int(os.environ.get("QUORATE_KILLS", "2"))
LIMIT = 300.0
"""Longest time from a kill to the end of the round in which it happened [s]."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900 + KILLS * int(LIMIT)), NEEDS_NGINX]
RUN = """
name: tiny
task: {name: sequence_classification, labels: [cardiac, hepatic, pulmonary], max_length: 24}
data: notes
model: {model_name_or_path: "MODEL", sha256: HASH}
adapter: {r: 2}
training: {max_steps: 2, per_device_train_batch_size: 4, learning_rate: 1e-2, max_stack: 1}
federation: {rounds: 1000, quorum: 2, grace_seconds: 5, timeout_seconds: 3600, reask_seconds: 300}
evaluation: {bootstrap_samples: 0}
"""
NAMES = ("north", "south")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Iterator[Loopback]:
    folder = tmp_path_factory.mktemp("kills")
    for name in NAMES:
        rows = [f"{word} {name} {n},{label}" for n in range(8) for label, word in LABELS.items()]
        (folder / f"{name}.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    models = pin_model(folder, RUN, tiny_bert)
    data = {name: {"notes": {"source": str(folder / f"{name}.csv")}} for name in NAMES}
    loopback = Loopback(folder, data, models)
    with loopback.running():
        yield loopback


def begun(federation: Loopback) -> list[tuple[int, str]]:
    """(round, phase) of every phase that the run has begun."""
    events = list((federation.home / "state" / "runs").glob("*/events.jsonl"))
    lines = [json.loads(line) for line in events[0].read_text().splitlines() if line] if events else []
    return [(line["round"], line["name"]) for line in lines if line["event"] == "phase" and line.get("round")]


def finished(federation: Loopback) -> int:
    """The last round that the run has finished."""
    events = list((federation.home / "state" / "runs").glob("*/events.jsonl"))
    lines = [json.loads(line) for line in events[0].read_text().splitlines() if line] if events else []
    return max((line["record"]["round"] for line in lines if line["event"] == "round"), default=0)


def kill(federation: Loopback, victim: str) -> None:
    if victim == "SuperExec":
        federation.kill("superexec")
        return
    pid = json.loads((federation.home / "state" / "status.json").read_text())["pid"]
    os.kill(pid, signal.SIGKILL)
    time.sleep(2)  # its programs end with it
    federation.quorate("server", "start", "--federation", NAME)


def test_no_kill_of_the_server_leaves_a_run_hanging(federation: Loopback) -> None:
    seed = random.Random(KILLS)
    running = federation.run_in_background("run", "tiny.yaml", "--federation", NAME, "-o", "killed")
    assert running.stdout is not None
    said: list[str] = []  # read all the time: a full pipe would stop the command after some thirty kills
    reader = threading.Thread(target=said.extend, args=(running.stdout,), daemon=True)
    reader.start()
    try:
        wait_for(lambda: finished(federation) >= 1, f"no first round\n{federation.logs()}", 400)
        for number in range(KILLS):
            victim = "supervisor" if number % 3 == 1 else "SuperExec"
            known = len(begun(federation))
            wait_for(lambda known=known: len(begun(federation)) > known, "no phase begins", LIMIT)
            time.sleep(seed.uniform(0.0, 5.0))  # messages are on their way, taken, or worked on
            assert running.poll() is None, "".join(said)
            before, started = finished(federation), time.monotonic()
            kill(federation, victim)
            wait_for(
                lambda before=before: finished(federation) > before,
                f"try {number}: after the kill of the {victim} the run hangs\n{federation.logs()}",
                LIMIT,
            )
            # A round that ended in the moment of the kill says nothing: the next try waits for another phase.
            note(f"{number + 1}\t{victim}\t{time.monotonic() - started:.1f} s")
        last = finished(federation)
        wait_for(lambda: finished(federation) >= last + 2, "no further rounds", LIMIT)
        (run_dir,) = (federation.home / "state" / "runs").iterdir()
        federation.quorate("runs", "stop", run_dir.name, "--federation", NAME)
        running.wait(timeout=300)
    finally:
        running.kill()
        running.wait()
        reader.join(10)
        running.stdout.close()
    assert running.returncode == 130


def note(line: str) -> None:
    if path := os.environ.get("QUORATE_KILLS_LOG"):
        with Path(path).open("a") as file:
            file.write(line + "\n")
