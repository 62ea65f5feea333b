"""`quorate audit`: what it prints and writes, what the report shows of it, and the gate before an export."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from quorate.deploy.cli import run

pytestmark = pytest.mark.slow
WORDS = "heart liver lung bone nerve drug trial cell gene fever"
RUN = """
name: tiny
task: {{name: sequence_classification, labels: [cardiac, hepatic], max_length: 24}}
data: notes
model: {{model_name_or_path: {model}}}
adapter: {{r: 4}}
training: {{max_steps: 10, per_device_train_batch_size: 16, learning_rate: 1e-2, optim: sgd}}
federation: {{rounds: 2, grace_seconds: 0}}
evaluation: {{bootstrap_samples: 0}}
privacy: {{unit: record, target_epsilon: 1, delta: 1e-5}}
"""
SITES = "data: {notes: {source: notes.csv, partition: {by: iid, sites: [north, south]}}}\n"
FEWER = ("--canaries", "200", "--reference-pairs", "1", "--log-level", "warning")


@pytest.fixture
def made(tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private run of two sites."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    lines = [
        f"{' '.join(draw.sample(WORDS.split(), 5))},{draw.choice(('cardiac', 'hepatic'))}" for _ in range(240)
    ]
    (tmp_path / "notes.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    (tmp_path / "tiny.yaml").write_text(RUN.format(model=tiny_bert))
    (tmp_path / "tiny.sites.yaml").write_text(SITES)
    assert run(["simulate", "tiny.yaml", "-o", "out", "--log-level", "warning"]) == 0
    return tmp_path / "out"


def test_an_audit_stands_beside_the_claim(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "What attacks on it found" not in (made / "report.html").read_text()
    assert run(["export", "out", "--merge", "--require-audit", "-o", "merged"]) == 1
    assert "audit.json: there is none; make it with `quorate audit out`" in capsys.readouterr().err

    assert run(["audit", "out", "--json", *FEWER]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {each["site"] for each in told["mechanism"]} == {"north", "south"} and told["refuted"] == []
    assert all(each["claim"]["epsilon"] == pytest.approx(1, rel=0.01) for each in told["mechanism"])
    assert told["membership"]["attack"]["members"] + 2 > 120
    assert [leak["site"] for leak in told["token_leaks"]] == ["north", "south"] and told["client"] is None
    kept = json.loads((made / "audit.json").read_text())
    assert kept == {name: value for name, value in told.items() if name != "refuted"}
    report = (made / "report.html").read_text()
    assert "What attacks on it found" in report and "Epsilon claimed" in report
    assert run(["export", "out", "--merge", "--require-audit", "-o", "merged"]) == 0

    # Another adapter than the audited one, and a refuted claim, stay in.
    weights = made / "adapter" / "adapter_model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert run(["export", "out", "--merge", "--require-audit", "-o", "again"]) == 1
    assert "is of another adapter" in capsys.readouterr().err
    weights.write_bytes(before)
    kept["mechanism"][0]["epsilon_at_least"] = 2.5
    (made / "audit.json").write_text(json.dumps(kept))
    assert run(["export", "out", "--merge", "--require-audit", "-o", "again"]) == 1
    assert "epsilon is 2.5 or more with 99.9% confidence, and 1 is claimed" in capsys.readouterr().err
    assert run(["report", "out"]) == 0
    assert "A claim is refuted" in (made / "report.html").read_text()


def test_one_site_and_what_is_wrong(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["audit", "out", "--site", "east", *FEWER]) == 2
    assert "--site east: the run's sites are north, south" in capsys.readouterr().err
    assert run(["audit", "out", "--site", "north", "--canaries", "200", "--reference-pairs", "0"]) == 0
    said = capsys.readouterr().out
    assert "north" in said and "south" not in said and "nothing refutes the claim" in said
    assert run(["audit", "out", "--canaries", "10000000", "--reference-pairs", "0"]) == 2
    assert "canaries: 10000000 canaries in" in capsys.readouterr().err
    assert run(["audit", "nowhere"]) == 2
    (made / "adapter" / "adapter_config.json").unlink()
    assert run(["audit", "out", *FEWER]) == 2
    assert "has no adapter_config.json" in capsys.readouterr().err


def test_site_level_privacy_is_audited_with_canary_sites(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site_level = [
        "privacy={unit: client, target_epsilon: 1, delta: 1e-5}",
        "aggregation={name: ffa, weighting: uniform}",
    ]
    assert run(["simulate", "tiny.yaml", *site_level, "-o", "central", "--log-level", "warning"]) == 0
    capsys.readouterr()
    assert run(["audit", "central", "--canaries", "40", "--reference-pairs", "0"]) == 0
    said = capsys.readouterr().out
    assert "by 40 canary sites" in said and "nothing refutes the claim" in said
    assert "not tried: token leak: no factor A moves" in said
    kept = json.loads((made.parent / "central" / "audit.json").read_text())
    assert kept["client"]["epsilon"] == pytest.approx(1, rel=0.01) and not kept["mechanism"]
    report = (made.parent / "central" / "report.html").read_text()
    assert "An audit with canary sites found epsilon of at least" in report
    assert "Does the noise of the server hide a site?" in report and "no factor A moves" in report
    assert run(["audit", "central", "--canaries", "100000", "--reference-pairs", "0"]) == 2
    assert "ask for fewer than 99998" in capsys.readouterr().err
