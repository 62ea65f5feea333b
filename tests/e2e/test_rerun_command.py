"""`quorate rerun`: the same adapter from the run's folder alone, and what it says of what changed."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from quorate.deploy.cli import run

RUN = """
name: tiny
task: {name: sequence_classification, labels: [cardiac, hepatic], max_length: 24}
data: notes
model: {model_name_or_path: base}
adapter: {r: 4}
training: {max_steps: 2, per_device_train_batch_size: 4, learning_rate: 1e-2}
federation: {rounds: 2, grace_seconds: 0}
evaluation: {bootstrap_samples: 0}
"""
SITES = """
data:
  notes:
    sites:
      - {name: north, source: "${NORTH}/notes.csv"}
      - {name: south, source: south.csv}
  others: {source: nosuch.csv, partition: {by: iid, sites: 2}}
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a run was made: its model and its data have relative paths, one with a variable in it."""
    kept, level = dict(os.environ), logging.getLogger("quorate").level
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(tiny_bert)
    (tmp_path / "data").mkdir()
    (tmp_path / "tiny.yaml").write_text(RUN)
    (tmp_path / "tiny.sites.yaml").write_text(SITES)
    for name in ("data/notes.csv", "south.csv"):
        lines = "".join(f"heart {n} pain,cardiac\nliver {n} drug,hepatic\n" for n in range(15))
        (tmp_path / name).write_text("text,label\n" + lines)
    os.environ["NORTH"] = str(tmp_path / "data")
    yield tmp_path
    logging.captureWarnings(False)
    logging.getLogger("quorate").setLevel(level)
    os.environ.clear()
    os.environ.update(kept)


def test_a_run_is_made_again_from_its_folder(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["simulate", "tiny.yaml", "-o", "out"]) == 0
    kept = (folder / "out" / "sites.yaml").read_text()
    assert "${NORTH}/notes.csv" in kept and f"{folder}/south.csv" in kept and "nosuch" not in kept
    weights = Path("adapter") / "adapter_model.safetensors"
    before = (folder / "out" / weights).read_bytes()

    # Another working directory, no sites file at hand, the variable gone.
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    os.chdir(elsewhere)
    del os.environ["NORTH"]
    capsys.readouterr()
    assert run(["rerun", str(folder / "out"), "-o", "again", "--json", "--log-level", "warning"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["same_adapter"] is True and err == ""
    assert (elsewhere / "again" / weights).read_bytes() == before
    # What was made again can be made again, now without saying where.
    assert run(["rerun", "again"]) == 0
    assert capsys.readouterr().out.endswith("same adapter, byte for byte\n")
    assert (elsewhere / "again-rerun" / weights).read_bytes() == before

    # Another adapter is not passed over.
    (folder / "out" / weights).write_bytes(before + b"x")
    assert run(["rerun", str(folder / "out"), "-o", "third"]) == 1
    assert "is not the same as that of" in capsys.readouterr().err


def test_what_changed_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert run(["simulate", "tiny.yaml", "-o", "out", "federation.rounds=1"]) == 0
    environment = folder / "out" / "environment.json"
    found = json.loads(environment.read_text())
    assert set(found["data"]) == {"north", "south"} and found["data"]["north"]["train"]["rows"] > 0

    changed = json.loads(environment.read_text())
    changed["versions"]["peft"] = "0.0.1"
    environment.write_text(json.dumps(changed))
    capsys.readouterr()
    assert run(["rerun", "out", "-o", "again"]) == 0
    assert [each.message[:32] for each in caplog.records if each.levelname == "WARNING"] == [
        "version of peft was 0.0.1, is 0."
    ]

    # A text that changed, and nothing else: it may lie in another split then, and its words are not quoted.
    content = (folder / "south.csv").read_text()
    (folder / "south.csv").write_text(content.replace("heart 7 pain", "heart 7 rash"))
    for command in (
        ["rerun", "out", "-o", "third"],
        ["simulate", "tiny.yaml", "-o", "out", "federation.rounds=1", "--resume"],
    ):
        assert run(command) == 2
        err = capsys.readouterr().err
        assert "DataError: the data are not those of the run in out: site south, split " in err
        assert (
            1 <= err.count("split ") <= 2 and "north" not in err.split("DataError")[1] and "rash" not in err
        )
    assert not (folder / "third").exists()


def test_a_folder_without_an_origin(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["rerun", "."]) == 2
    assert "holds no run (no run.yaml)" in capsys.readouterr().err
    (folder / "run.yaml").write_text(RUN)
    assert run(["rerun", "."]) == 2
    assert "has no environment.json" in capsys.readouterr().err
