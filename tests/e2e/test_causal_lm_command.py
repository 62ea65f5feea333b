"""A language model from the run file to its answers, as a person calls it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_lm

from quorate.deploy.cli import run

RUN = """
name: tiny
task:
  name: causal_lm
  max_length: 40
  max_new_tokens: 6
  packing: true
  sample_prompts: ["<b>fever?"]
data: questions
model: {model_name_or_path: "${TINY_LM}"}
adapter: {r: 8, target_modules: all-linear}
training: {max_steps: 15, per_device_train_batch_size: 2, learning_rate: 2e-2, gradient_checkpointing: true}
federation: {rounds: 2, quorum: 2, grace_seconds: 0}
aggregation: {name: fedavg, weighting: tokens}
evaluation: {bootstrap_samples: 20}
"""
SITES = (
    "data: {questions: {source: rows.jsonl, partition: {by: sizes, sites: [north, south], shares: [3, 1]}}}\n"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINY_LM", str(tiny_lm.save(tmp_path / "model", "llama")))
    (tmp_path / "tiny.yaml").write_text(RUN)
    (tmp_path / "tiny.sites.yaml").write_text(SITES)
    lines = [json.dumps(dict(row.values)) for row in tiny_lm.lm_rows(60, 0)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    kept, level = dict(os.environ), logging.getLogger("quorate").level
    yield tmp_path
    logging.captureWarnings(False)
    logging.getLogger("quorate").setLevel(level)
    os.environ.clear()
    os.environ.update(kept)


@pytest.mark.slow
def test_from_rows_to_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", "tiny.yaml", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    records = [json.loads(line) for line in (folder / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    losses = [record["validation"]["pooled"]["loss"] for record in records]
    assert losses[-1] < losses[0] - 0.3, "it must learn"
    assert summary["metric"] == "loss"
    record = json.loads((folder / "runs/tiny/record.jsonl").read_text().splitlines()[0])
    rows = summary["sites"]["north"]["rows"]["train"]
    assert record["num_examples"]["north"] == rows, "rows, not packed sequences"
    assert record["weights"]["north"] != rows / sum(record["num_examples"].values()), "weighed by tokens"
    assert any("packed" in note for note in summary["sites"]["north"]["notes"])
    (sample,) = summary["samples"]
    assert sample["prompt"] == "<b>fever?" and sample["base"] != sample["adapted"]
    page = (folder / "runs/tiny/report.html").read_text()
    assert "What it writes" in page and "&lt;b&gt;fever?" in page

    assert run(["predict", "runs/tiny", "<b>fever?", "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)["predictions"]
    assert said == {"text": "<b>fever?", "completion": sample["adapted"]}, (
        "the exported adapter says the same"
    )
    assert run(["predict", "runs/tiny", "fever?"]) == 0
    assert "completion" in capsys.readouterr().out
