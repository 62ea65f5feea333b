"""`quorate simulate`, `report` and `predict` on a small real model, as a person calls them."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quorate.deploy.cli import run
from quorate.server.tracking.records import Summary

TEXTS = {
    "cardiac": "heart blood rhythm pain",
    "hepatic": "liver dose drug rash",
    "pulmonary": "lung cough scan",
}
RUN = """
name: tiny
task: {name: sequence_classification, labels: [cardiac, hepatic, pulmonary], max_length: 24}
data: notes
model: {model_name_or_path: "${TINY_BERT}"}
adapter: {r: 4}
training: {max_steps: 2, per_device_train_batch_size: 4, learning_rate: 1e-2}
federation: {rounds: 2, quorum: 2, grace_seconds: 0}
evaluation: {bootstrap_samples: 20, references: [local_only, centralised]}
"""
SITES = "data: {notes: {source: notes.csv, partition: {by: iid, sites: [north, south]}}}\n"


@pytest.fixture
def folder(tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a run, its sites file and its data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINY_BERT", str(tiny_bert))
    (tmp_path / "tiny.yaml").write_text(RUN)
    (tmp_path / "tiny.sites.yaml").write_text(SITES)
    lines = [f"{text},{label}" for _ in range(20) for label, text in TEXTS.items()]
    (tmp_path / "notes.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    kept, level = dict(os.environ), logging.getLogger("quorate").level
    yield tmp_path
    logging.captureWarnings(False)
    logging.getLogger("quorate").setLevel(level)
    os.environ.clear()
    os.environ.update(kept)


def test_from_run_file_to_prediction(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", "tiny.yaml"]) == 0
    out, err = capsys.readouterr()
    for line in ("round 2/2 · train", "round 2/2 · evaluate", "tiny: 2 rounds over 2 sites, into runs/tiny"):
        assert line in err.splitlines()
    assert "\x1b" not in out + err
    assert "federated" in out and "local only" in out and "centralised" in out
    assert "adapter  runs/tiny/adapter\n" in out and "report   runs/tiny/report.html\n" in out

    # Never over an earlier run; a finished one has nothing left to do.
    assert run(["simulate", "tiny.yaml"]) == 2
    assert "already holds a run; continue it with --resume" in capsys.readouterr().err
    before = (folder / "runs/tiny/adapter/adapter_model.safetensors").read_bytes()
    assert run(["simulate", "tiny.yaml", "--resume", "--json", "--log-level", "error"]) == 0
    out, _ = capsys.readouterr()
    assert json.loads(out) == json.loads((folder / "runs/tiny/summary.json").read_text())
    assert (folder / "runs/tiny/adapter/adapter_model.safetensors").read_bytes() == before
    assert run(["simulate", "tiny.yaml", "seed=9", "--resume"]) == 2
    assert "other settings (seed)" in capsys.readouterr().err

    page = (folder / "runs/tiny/report.html").read_bytes()
    (folder / "runs/tiny/report.html").unlink()
    assert run(["report", "runs/tiny"]) == 0
    assert capsys.readouterr().out == "runs/tiny/report.html\n"
    assert (folder / "runs/tiny/report.html").read_bytes() == page

    (folder / "new.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS.values()))
    assert run(["predict", "runs/tiny", "new.jsonl", "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["predictions"]
    assert [each["text"] for each in found] == list(TEXTS.values())
    assert all(abs(sum(each["scores"].values()) - 1) < 1e-5 for each in found)
    assert run(["predict", "runs/tiny/adapter", TEXTS["cardiac"]]) == 0
    assert found[0]["label"] in capsys.readouterr().out


def test_a_quorum_that_cannot_be_met_says_so_before_training(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["simulate", "tiny.yaml", "federation.quorum=3", "-o", "out"]) == 2
    assert "federation.quorum: 3 is above the number of sites (2: north, south)" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_a_lost_quorum_exits_3_with_a_summary(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # No update is as small as this, so every one is set aside.
    arguments = ["simulate", "tiny.yaml", "federation.max_update_norm=1e-9", "-o", "out", "--json"]
    assert run(arguments) == 3
    out, err = capsys.readouterr()
    assert Summary.model_validate(json.loads(out)).status == "quorum-not-met"
    assert err.splitlines()[-1].startswith("QuorumNotMet: round 1 needs 2 of 2 sites")
    assert "Traceback" not in err and (folder / "out" / "report.html").is_file()


def test_an_output_folder_that_cannot_be_made(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "taken").write_text("a file")
    assert run(["simulate", "tiny.yaml", "-o", "taken/out"]) == 2
    err = capsys.readouterr().err
    assert "OutputError: cannot write to taken/out" in err and "Traceback" not in err


@pytest.mark.slow
def test_ctrl_c_writes_what_finished_rounds_gave(folder: Path) -> None:
    command = [sys.executable, "-c", "from quorate.deploy.cli import main; main()"]
    arguments = ["simulate", "tiny.yaml", "federation.rounds=100000", "-o", "out", "--json"]
    process = subprocess.Popen(
        [*command, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder
    )
    assert process.stderr is not None
    heard = []
    for line in process.stderr:
        heard.append(line)
        if line.startswith("round 2/100000 · ") and line.endswith(" s\n"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, "".join(heard) + err
    summary = Summary.model_validate(json.loads(out))
    # Round 2's line is written before its last instructions: it may be the round that was in flight.
    assert summary.status == "interrupted" and summary.rounds >= 1
    assert err.endswith("interrupted\n") and "Traceback" not in err
    assert (folder / "out/adapter/adapter_model.safetensors").is_file()
    assert (folder / "out/report.html").is_file()
