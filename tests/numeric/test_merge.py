"""`quorate export --merge`: a model that answers as base and adapter do, for who has transformers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from refusals import refuses

from quorate.client.models.merge import merge
from quorate.client.models.predictions import with_adapter
from quorate.deploy.cli import run as quorate
from quorate.shared.errors import ModelError, OutputError
from quorate.shared.model.base_model import hash_files, load_base
from quorate.shared.model.weights import weights_sha256
from quorate.simulations.runner import simulate

TEXTS = ["heart pain dose scan", "cough lung lung rash", "liver", "fever drug cell gene bone nerve trial"]


def logits(model: Any, folder: Path) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return model.eval()(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits


@pytest.mark.parametrize("rule", ["fedavg", "fedex"])
def test_the_merged_model_gives_the_adapters_logits(
    make_run: Any, make_sites: Any, tmp_path: Path, tiny_bert: Path, rule: str
) -> None:
    config = make_run(aggregation={"name": rule}, training={"max_steps": 8})
    simulate(config, make_sites(north=12, south=9), tmp_path / "run")
    adapter, folder = tmp_path / "run" / "adapter", tmp_path / "merged"
    sha256 = merge(adapter, folder)

    base = load_base(config)
    plain = logits(base.model, tiny_bert)
    expected = logits(with_adapter(base, adapter), tiny_bert)
    found = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert (logits(found, folder) - expected).abs().max() < 1e-5
    assert (plain - expected).abs().max() > 1e-2, "an adapter that does nothing would merge well in any way"
    assert found.config.num_labels == 3 and list(found.config.id2label.values()) == list(config.task.labels)
    assert not any("lora" in name for name in found.state_dict())
    assert sha256 == weights_sha256(hash_files(folder), folder)


def test_what_does_not_merge_is_refused_and_leaves_nothing(
    make_run: Any, make_sites: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate(make_run(federation={"rounds": 1}), make_sites(north=12), tmp_path / "run")
    adapter, folder = tmp_path / "run" / "adapter", tmp_path / "merged"
    assert quorate(["export", str(tmp_path / "run"), "-o", str(folder)]) == 2
    assert "--merge" in capsys.readouterr().err
    assert quorate(["export", str(tmp_path / "run"), "--merge", "-o", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == str(folder)
    with refuses(OutputError, "folder-in-use"):
        merge(adapter, folder)

    settings = adapter / "run.yaml"
    written = settings.read_text()
    other = tmp_path / "other"
    for change, kind, named in (
        ("load_in_4bit: false|load_in_4bit: true", "quantised-base", "4 bits"),
        ("load_in_8bit: false|load_in_8bit: true", "quantised-base", "8 bits"),
        ("head: null|head: {hidden_sizes: [8]}", "own-head", "adapter.head"),
    ):
        before, after = change.split("|")
        settings.write_text(written.replace(before, after))
        assert settings.read_text() != written
        with refuses(ModelError, kind, where=str(adapter)) as caught:
            merge(adapter, other)
        assert named in str(caught.value)
    pinned = next(line for line in written.splitlines() if "sha256" in line)
    settings.write_text(written.replace(pinned, pinned[:-64] + "0" * 64))
    with refuses(ModelError, "other-weights"):
        merge(adapter, other)
    assert not other.exists() and not (tmp_path / ".other.tmp").exists()
