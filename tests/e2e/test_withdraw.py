"""A person takes a site out of a run that is going on: what the coordinator and the site see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from loopback import NAME, NEEDS_NGINX, Loopback, pin_model, wait_for
from tiny_runs import LABELS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), NEEDS_NGINX]
RUN = """
name: tiny
task: {name: sequence_classification, labels: [cardiac, hepatic, pulmonary], max_length: 24}
data: notes
model: {model_name_or_path: "MODEL", sha256: HASH}
adapter: {r: 4}
training: {max_steps: 60, per_device_train_batch_size: 4, learning_rate: 1e-2}
federation: {rounds: 4, quorum: 1, grace_seconds: 60}
evaluation: {bootstrap_samples: 20}
"""


def records(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "record.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def seen_at(site: str, federation: Loopback) -> list[dict[str, Any]]:
    """The runs as the site's own people see them."""
    return list(json.loads(federation.quorate("site", "runs", site, "--json").stdout)["runs"])


def test_a_site_leaves_a_run_that_goes_on(tmp_path: Path, tiny_bert: Path) -> None:
    lines = [
        f"{word} {n % 7},{label}" for n in range(20) for label, own in LABELS.items() for word in own.split()
    ]
    (tmp_path / "notes.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    models = pin_model(tmp_path, RUN, tiny_bert)
    data = {"notes": {"source": str(tmp_path / "notes.csv")}}
    federation = Loopback(tmp_path, {"north": data, "south": data}, models)
    with federation.running():
        running = federation.run_in_background("run", "tiny.yaml", "--federation", NAME, "-o", "out")
        try:

            def measured() -> list[dict[str, Any]]:
                return [each for each in seen_at("north", federation) if "outcomes" in each["left"]]

            (seen,) = wait_for(measured, "no round", 400)  # its people look, and need nobody else to
            run_id = seen["run_id"]
            assert (seen["name"], seen["federation"], seen["rounds"]) == ("tiny", NAME, 4)
            assert seen["rows"] and seen["left"]["arrays"]
            said = federation.quorate("site", "withdraw", run_id, "--folder", "north").stdout
            assert said == f"site north answers nothing of run {run_id} any more\n"
            told, _ = running.communicate(timeout=600)
        finally:
            running.kill()
            running.wait()
        assert running.returncode == 0, f"{told}\n{federation.logs()}"
        assert "was withdrawn from this run by its people" in told
        done = records(tmp_path / "out")
        left = [sorted(each["excluded"]) for each in done]
        assert len(left) == 4 and left[0] == [] and left[-1] == ["north"]
        assert done[-1]["excluded"]["north"]["code"] == "withdrawn"
        status = json.loads(federation.quorate("site", "status", "north", "--json", code=0).stdout)
        assert status["withdrawn"] == [run_id] and status["site_file"]["state"] == "in use"
        (seen,) = seen_at("north", federation)
        assert seen["state"] == "withdrawn" and seen["withdrawal"]["by"] and seen["trained"] < 4
        assert seen["refusal"]["code"] == "withdrawn"
        (other,) = seen_at("south", federation)
        assert (other["run_id"], other["state"], other["trained"]) == (run_id, "finished", 4)
        log = (tmp_path / "north" / "state" / "logs" / "site.log").read_text()
        assert f"run {run_id} (tiny), round 1, fit: answered with" in log
        north = tmp_path / "north" / "state" / "received"
        assert not north.exists() or not list(north.iterdir()), "it gets no result of a run that it left"
        assert (tmp_path / "south" / "state" / "received" / run_id / "adapter").is_dir()
        federation.quorate("site", "withdraw", run_id, "--folder", "north", "--undo")
        status = json.loads(federation.quorate("site", "status", "north", "--json", code=0).stdout)
        assert status["withdrawn"] == []
