"""`quorate tune`: a search that is killed and gone on with loses nothing and changes nothing."""

import csv
import json
import logging
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quorate.client.privacy.units import plan_of
from quorate.deploy.cli import run
from quorate.server.rounds import loop
from quorate.server.tracking.events import EVENTS_FILE, EventsReader
from quorate.shared.config.load import load_run, load_sites_file
from quorate.shared.privacy.accounting import epsilon
from quorate.shared.privacy.privacy_event import PrivacyEvent
from quorate.shared.privacy.rounding import at_most
from quorate.simulations.simulated_sites import load_sites
from quorate.simulations.tuning.space import load_space

pytest.importorskip("optuna", reason="needs the extra `tune`")

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
def folder(tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    kept, level = dict(os.environ), logging.getLogger("quorate").level
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINY_BERT", str(tiny_bert))
    (tmp_path / "tiny.yaml").write_text(RUN)
    (tmp_path / "tiny.sites.yaml").write_text(SITES)
    (tmp_path / "space.yaml").write_text(SPACE)
    draw = random.Random(5)
    lines = "".join(
        f"{text} {' '.join(draw.choices(text.split(), k=6))},{label}\n"  # equal rows have one split
        for _ in range(20)
        for label, text in TEXTS.items()
    )
    (tmp_path / "notes.csv").write_text("text,label\n" + lines)
    yield tmp_path
    logging.captureWarnings(False)
    logging.getLogger("quorate").setLevel(level)
    os.environ.clear()
    os.environ.update(kept)


def tuned(*arguments: str) -> int:
    return run(["tune", "tiny.yaml", "--space", "space.yaml", *arguments])


def killed_in(place: Path, *arguments: str) -> None:
    """Run a search in a process of its own that kills itself (-9) once the checkpoint `place` is written."""
    child = os.fork()  # not a new interpreter: importing torch takes longer than the search
    if not child:
        write = loop.save_checkpoint

        def last(*given: Any, **named: Any) -> Path:
            written = write(*given, **named)
            if written.resolve() == place.resolve():
                os.kill(os.getpid(), signal.SIGKILL)
            return written

        loop.save_checkpoint = last
        os._exit(tuned(*arguments))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def tried(folder: Path) -> list[tuple[Any, ...]]:
    """What counted, in order: settings and value."""
    found = json.loads((folder / "tune.json").read_text())["trials"]
    return [(each["values"], each["value"]) for each in found if each["state"] != "cut off"]


@pytest.mark.slow
def test_a_killed_search_ends_as_one_that_was_not(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tuned("-o", "whole", "--json") == 0
    whole = json.loads(capsys.readouterr().out)
    assert [each["state"] for each in whole["trials"]] == ["done"] * 4

    killed_in(folder / "out/trials/002/checkpoint-1", "-o", "out")
    capsys.readouterr()
    # Without --resume nothing is touched; with it the trial that was cut off is run again.
    assert tuned("-o", "out") == 2
    assert "already holds a search; continue it with --resume" in capsys.readouterr().err
    assert tuned("-o", "out", "--resume") == 0
    out, err = capsys.readouterr()
    assert "trial 2 was cut off; it is run again" in err and "best macro_f1 on validation rows" in out
    found = json.loads((folder / "out" / "tune.json").read_text())
    states = [(each["state"], each["retry_of"]) for each in found["trials"]]
    assert states == [("done", None), ("done", None), ("cut off", None), ("done", 2), ("done", None)]
    assert found["trials"][3]["values"] == found["trials"][2]["values"]
    assert tried(folder / "out") == tried(folder / "whole")
    assert not list((folder / "out" / "trials").rglob("checkpoint-*"))

    # The best run file is a run that gives what the trial gave.
    best = found["best"]
    assert load_run(folder / "out/best.yaml").adapter.r == best["values"]["adapter.r"]
    assert run(["simulate", "out/best.yaml", "-o", "run", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)["best"]
    assert summary["round"] == best["best_round"]
    assert summary["validation"]["pooled"]["macro_f1"] == best["value"]

    with (folder / "out" / "trials.csv").open(newline="") as stream:
        assert [row["trial"] for row in csv.DictReader(stream)] == ["0", "1", "2", "3", "4"]
    page = (folder / "out" / "tune.html").read_text()
    assert "http" not in page.replace("http-equiv", "") and 'id="importance-title"' in page

    # Another space is another search, and an unknown field is refused before anything is tried.
    (folder / "space.yaml").write_text(SPACE.replace("[2, 4]", "[2, 8]"))
    assert tuned("-o", "out", "--resume") == 2
    assert "holds a search of another space" in capsys.readouterr().err
    (folder / "space.yaml").write_text(SPACE.replace("adapter.r", "adapter.rank"))
    assert tuned("-o", "third") == 2
    assert "adapter.rank: the run file has no such field" in capsys.readouterr().err
    assert not (folder / "third").exists()


def searched(folder: Path, out: str, rates: list[float], *overrides: str) -> Any:
    """Search over these learning rates, in this order, and return what came of it."""
    from quorate.simulations.tuning.search import tune
    from quorate.simulations.tuning.trial import Search
    from quorate.simulations.tuning.tuning_report import summarise

    (folder / "space.yaml").write_text(
        "sampler: grid\nstartup_trials: 1\nwarmup_rounds: 0\nspace:\n"
        f"  training.learning_rate: {{type: categorical, choices: {rates}}}\n"
    )
    run_file = Path("tiny.yaml")
    rows = load_sites(load_sites_file(Path("tiny.sites.yaml")), folder, load_run(run_file))
    space = load_space(Path("space.yaml"), run_file)
    orders = {
        seed: [each["training.learning_rate"] for each in space.model_copy(update={"seed": seed}).grid()]
        for seed in range(50)
    }
    seed = next(seed for seed, order in orders.items() if order == rates)
    said: list[str] = []
    space = space.model_copy(update={"seed": seed})
    search = Search(run_file, overrides, space, rows, folder / out, say=said.append)
    result = summarise(search, tune(search))
    # A grid ends by itself, with every point tried once.
    assert [each.values["training.learning_rate"] for each in result.trials] == rates
    assert len(said) == len(rates)
    return result


def rounds_of(folder: Path, out: str, trial: Any) -> int:
    return (folder / out / f"trials/{trial.number:03d}/record.jsonl").read_text().count("\n")


@pytest.mark.slow
def test_a_trial_that_falls_behind_is_stopped(folder: Path) -> None:
    # What does not learn comes after what does, or there is nothing that it falls behind.
    result = searched(folder, "out", [3e-2, 1e-9], "training.max_steps=12")
    assert [each.state for each in result.trials] == ["done", "stopped early"]
    assert result.best == result.trials[0]
    assert [rounds_of(folder, "out", each) for each in result.trials] == [ROUNDS, 1]
    told = [EventsReader(folder / f"out/trials/{name}" / EVENTS_FILE).read() for name in ("000", "001")]
    assert [sum(each.event == "round" for each in events) for events in told] == [ROUNDS, 1]


@pytest.mark.slow
def test_a_trial_that_diverges_is_told_apart(folder: Path) -> None:
    far = ("training.optim=sgd", "training.max_grad_norm=0", "adapter.lora_alpha=1e9")
    result = searched(folder, "far", [1e6, 1e5], *far)
    assert [each.state for each in result.trials] == ["diverged", "diverged"]
    assert rounds_of(folder, "far", result.trials[0]) == 0


@pytest.mark.slow
def test_what_trials_spend_together_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the first trial by the run file's settings; at the end by those that were tried.

    A trial that was cut off and run again counts twice: both trained, each with noise of its own.
    """
    (folder / "space.yaml").write_text(
        "sampler: grid\npruner: none\nspace:\n"
        "  privacy.noise_multiplier: {type: categorical, choices: [1.0, 2.0]}\n"
    )
    private = "privacy={unit: record, noise_multiplier: 1.0, delta: 1e-3}"
    killed_in(folder / "out/trials/001/checkpoint-1", private, "-o", "out")
    capsys.readouterr()
    assert tuned(private, "-o", "out", "--resume") == 0
    said = capsys.readouterr()
    result = json.loads((folder / "out" / "tune.json").read_text())
    found, noises = result["spent"], [each["values"]["privacy.noise_multiplier"] for each in result["trials"]]
    assert len(noises) == 3 and set(noises) == {1.0, 2.0}
    assert "2 of them together come to epsilon" in said.err and f"{at_most(found['epsilon'])} at" in said.out
    assert "Every trial spends privacy of its own" in (folder / "out" / "tune.html").read_text()

    rows = load_sites(load_sites_file(Path("tiny.sites.yaml")), folder, load_run(Path("tiny.yaml")))
    totals = {
        site: epsilon(
            [
                PrivacyEvent(
                    sampling_probability=4 / len(splits["train"]), noise_multiplier=noise, steps=2 * ROUNDS
                )
                for noise in noises
            ],
            1e-3,
        )
        for site, splits in rows.items()
    }
    assert found["trials"] == 3 and found["epsilon"] == pytest.approx(totals[found["site"]])
    assert found["epsilon"] == pytest.approx(max(totals.values()))
    single = load_run(Path("tiny.yaml"), [private])
    alone = plan_of(single, found["site"], rows[found["site"]]["train"]).claim().epsilon
    assert alone < found["epsilon"] < 3 * alone
