"""`quorate tune`: a search that is killed and gone on with loses nothing and changes nothing."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from quorate.simulations.space import load_space

pytest.importorskip("optuna")

ROUNDS = 3
RUN = f"""
name: tiny
task: {{name: sequence_classification, labels: [cardiac, hepatic, pulmonary], max_length: 24}}
data: notes
model: {{model_name_or_path: "${{TINY_BERT}}"}}
adapter: {{r: 4}}
training: {{max_steps: 2, per_device_train_batch_size: 4}}
federation: {{rounds: {ROUNDS}, grace_seconds: 0}}
evaluation: {{bootstrap_samples: 0}}
"""
SITES = "data: {notes: {source: notes.csv, partition: {by: iid, sites: [north, south]}}}\n"
SPACE = """
startup_trials: 2
pruner: none
trials: 4
space:
  training.learning_rate: {type: float, low: 1.0e-3, high: 1.0e-1, log: true}
  adapter.r: {type: categorical, choices: [2, 4]}
"""
TEXTS = {"cardiac": "heart blood pain", "hepatic": "liver dose drug", "pulmonary": "lung cough scan"}


@pytest.fixture
def folder(tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TINY_BERT", str(tiny_bert))
    (tmp_path / "tiny.yaml").write_text(RUN)
    (tmp_path / "tiny.sites.yaml").write_text(SITES)
    (tmp_path / "space.yaml").write_text(SPACE)
    lines = "".join(f"{text},{label}\n" for _ in range(20) for label, text in TEXTS.items())
    (tmp_path / "notes.csv").write_text("text,label\n" + lines)
    return tmp_path


def command(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    program = [sys.executable, "-c", "from quorate.deploy.cli import main; main()", *arguments]
    return subprocess.Popen(
        program, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=280)
    return process.returncode, out, err


def tried(folder: Path) -> list[tuple[Any, ...]]:
    """What counted, in order: settings and value."""
    found = json.loads((folder / "tune.json").read_text())["trials"]
    return [(each["values"], each["value"]) for each in found if each["state"] != "cut off"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_search_ends_as_one_that_was_not(folder: Path) -> None:
    arguments = ["tune", "tiny.yaml", "--space", "space.yaml"]
    code, out, err = finish(command(folder, *arguments, "-o", "whole", "--json"))
    assert code == 0, err
    whole = json.loads(out)
    assert [each["state"] for each in whole["trials"]] == ["done"] * 4

    process = command(folder, *arguments, "-o", "out")
    while not (folder / "out/trials/002/checkpoint-1").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    # Without --resume nothing is touched; with it the trial that was cut off is run again.
    code, _, err = finish(command(folder, *arguments, "-o", "out"))
    assert code == 2 and "already holds a search; continue it with --resume" in err
    code, out, err = finish(command(folder, *arguments, "-o", "out", "--resume"))
    assert code == 0 and "trial 2 was cut off; it is run again" in err, err
    assert "best macro_f1 on validation rows" in out
    found = json.loads((folder / "out" / "tune.json").read_text())
    states = [(each["state"], each["retry_of"]) for each in found["trials"]]
    assert states == [("done", None), ("done", None), ("cut off", None), ("done", 2), ("done", None)]
    assert found["trials"][3]["values"] == found["trials"][2]["values"]
    assert tried(folder / "out") == tried(folder / "whole")
    assert not list((folder / "out" / "trials").rglob("checkpoint-*"))

    # Trials never saw a test row: those of a run with the same settings are its first.
    best = found["best"]
    assert (
        yaml.safe_load((folder / "out/best.yaml").read_text())["adapter"]["r"] == best["values"]["adapter.r"]
    )
    code, out, err = finish(command(folder, "simulate", "out/best.yaml", "-o", "run", "--json"))
    assert code == 0, err
    summary = json.loads(out)["best"]
    assert summary["round"] == best["best_round"]
    assert summary["validation"]["pooled"]["macro_f1"] == best["value"]

    with (folder / "out" / "trials.csv").open(newline="") as stream:
        assert [row["trial"] for row in csv.DictReader(stream)] == ["0", "1", "2", "3", "4"]
    page = (folder / "out" / "tune.html").read_text()
    assert "http" not in page.replace("http-equiv", "") and 'id="importance-title"' in page

    # Another space is another search.
    (folder / "space.yaml").write_text(SPACE.replace("[2, 4]", "[2, 8]"))
    code, _, err = finish(command(folder, *arguments, "-o", "out", "--resume"))
    assert code == 2 and "holds a search of another space" in err


@pytest.mark.slow
def test_trials_that_fall_behind_or_diverge(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quorate.shared.config.load import load_run, load_sites_file
    from quorate.simulations.sites import load_sites
    from quorate.simulations.trial import Search
    from quorate.simulations.tune import tune
    from quorate.simulations.tuned import summarise

    monkeypatch.chdir(folder)
    (folder / "space.yaml").write_text(
        "sampler: grid\nstartup_trials: 1\nwarmup_rounds: 0\nspace:\n"
        "  training.learning_rate: {type: categorical, choices: [3e-2, 1e-9, 1e38]}\n"
        "  training.optim: {type: categorical, choices: [adamw_torch, sgd]}\n"
    )
    run = Path("tiny.yaml")
    rows = load_sites(load_sites_file(Path("tiny.sites.yaml")), folder, load_run(run))
    said: list[str] = []
    search = Search(run, (), load_space(Path("space.yaml"), run), rows, folder / "out", say=said.append)
    result = summarise(search, tune(search))
    # A grid ends by itself, with every point tried once.
    points = [tuple(each.values.values()) for each in result.trials]
    assert len(points) == len(set(points)) == 6 == len(said)
    states = {tuple(each.values.values()): each.state for each in result.trials}
    assert "stopped early" in states.values()
    assert states[(1e38, "sgd")] == "diverged" and result.best is not None
    for each in result.trials:
        records = (folder / f"out/trials/{each.number:03d}/record.jsonl").read_text().count("\n")
        assert records == ROUNDS if each.state == "done" else records < ROUNDS
