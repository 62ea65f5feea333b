"""A small private run for `quorate forecast`, and what the command prints about it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from quorate.deploy.cli import run

WORDS = "heart liver lung bone nerve drug trial cell gene fever cough pain rash dose scan blood"
RUN = """
name: tiny
task: {{name: sequence_classification, labels: [cardiac, hepatic], max_length: 24}}
data: notes
model: {{model_name_or_path: {model}}}
adapter: {{r: 4}}
training: {{max_steps: 2, per_device_train_batch_size: 16, learning_rate: 1e-2}}
federation: {{rounds: 2, grace_seconds: 0}}
evaluation: {{bootstrap_samples: 0}}
privacy: {{unit: record, noise_multiplier: 1.2, delta: 1e-5}}
"""
SITES = "data: {notes: {source: notes.csv, partition: {by: iid, sites: [north, south]}}}\n"
SITE = "data: {notes: {source: notes.csv, columns: {group: patient}}}\ndevice: cpu\n"
QUIET = ("--log-level", "warning")


def write_tiny(folder: Path, model: Path) -> None:
    """Write a private run of two sites, and a site.yaml over the same rows, two of each patient."""
    draw = random.Random(0)
    lines = [
        f"{' '.join(draw.sample(WORDS.split(), 5))},{draw.choice(('cardiac', 'hepatic'))},p{row // 2}"
        for row in range(240)
    ]
    (folder / "notes.csv").write_text("text,label,patient\n" + "\n".join(lines) + "\n")
    (folder / "tiny.yaml").write_text(RUN.format(model=model))
    (folder / "tiny.sites.yaml").write_text(SITES)
    (folder / "site.yaml").write_text(SITE)


def forecast(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Return what the command prints with --json."""
    capsys.readouterr()
    assert run(["forecast", "tiny.yaml", *arguments, "--json", *QUIET]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found
