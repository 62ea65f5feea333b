"""A real federation of three sites, quorum two, of which one goes down in mid-run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from loopback import NAME, NEEDS_NGINX, Loopback, pin_model, wait_for
from tiny_runs import LABELS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), NEEDS_NGINX]
NAMES = ("east", "north", "south")
GRACE, ROUNDS = 20, 8
RUN = f"""
name: tiny
task: {{name: sequence_classification, labels: [cardiac, hepatic, pulmonary], max_length: 24}}
data: notes
model: {{model_name_or_path: "MODEL", sha256: HASH}}
adapter: {{r: 4}}
training: {{max_steps: 4, per_device_train_batch_size: 4, learning_rate: 1e-1}}
federation: {{rounds: {ROUNDS}, quorum: 2, grace_seconds: {GRACE}}}
evaluation: {{bootstrap_samples: 20}}
"""


def training_round(federation: Loopback, round: int) -> bool:
    """Whether the federation's one run trains this round."""
    for events in (federation.home / "state" / "runs").glob("*/events.jsonl"):
        for line in events.read_text().splitlines():
            event = json.loads(line)
            if event["event"] == "phase" and (event["round"], event["name"]) == (round, "train"):
                return True
    return False


def seconds_of(records: list[Any], *rounds: int) -> list[float]:
    return [sum(each["seconds"].values()) for each in records if each["round"] in rounds]


def test_a_site_that_is_down_costs_its_grace_once_and_later_rounds_nothing(
    tmp_path: Path, tiny_bert: Path
) -> None:
    lines = [f"{words},{label}" for label, words in LABELS.items() for _ in range(24)]
    for name in NAMES:
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    models = pin_model(tmp_path, RUN, tiny_bert)
    data = {name: {"notes": {"source": str(tmp_path / f"{name}.csv")}} for name in NAMES}
    federation = Loopback(tmp_path, data, models)
    with federation.running():
        running = federation.run_in_background("run", "tiny.yaml", "--federation", NAME, "-o", "out")
        try:
            wait_for(lambda: training_round(federation, 3), f"no round 3\n{federation.logs()}", 300)
            federation.quorate("site", "stop", "south")
            said, _ = running.communicate(timeout=600)
        finally:
            running.kill()
            running.wait()
    assert running.returncode == 0, f"{said}\n{federation.logs()}"
    record = (tmp_path / "out" / "record.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in record]
    assert all({"east", "north"} <= each["weights"].keys() for each in records)
    assert "south" in records[0]["weights"] and "south" not in records[-1]["weights"]
    undisturbed = max(seconds_of(records, 1, 2))
    assert max(seconds_of(records, 6, 7, 8)) <= 2 * undisturbed, [seconds_of(records, n) for n in range(1, 9)]
