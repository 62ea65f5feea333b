"""`quorate forecast`: its figures are those the run then has, and what it cannot forecast it says."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from ledgers import answer, key
from site_folder import write_folder

from quorate.client.budgets import Budgets, protected_data
from quorate.client.ledger import DATABASE, open_ledger
from quorate.client.trainer.private_plan import private_plan
from quorate.deploy.cli import run
from quorate.shared.config.load import load_run
from quorate.shared.privacy.accounting import epsilon
from quorate.shared.privacy.events import PrivacyEvent

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
KIT_LABELS = "task.labels=[cardiac, hepatic, pulmonary]"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private run of two sites, and a site.yaml over the same rows, two of each patient."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    lines = [
        f"{' '.join(draw.sample(WORDS.split(), 5))},{draw.choice(('cardiac', 'hepatic'))},p{row // 2}"
        for row in range(240)
    ]
    (tmp_path / "notes.csv").write_text("text,label,patient\n" + "\n".join(lines) + "\n")
    (tmp_path / "tiny.yaml").write_text(RUN.format(model=tiny_bert))
    (tmp_path / "tiny.sites.yaml").write_text(SITES)
    (tmp_path / "site.yaml").write_text(SITE)
    return tmp_path


def forecast(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run(["forecast", "tiny.yaml", *arguments, "--json", *QUIET]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_run_claims_and_sends_what_was_forecast(capsys: pytest.CaptureFixture[str]) -> None:
    found = forecast(capsys, "--no-measure")
    assert run(["simulate", "tiny.yaml", "-o", "out", *QUIET]) == 0
    summary = json.loads(Path("out/summary.json").read_text())
    assert [site["site"] for site in found["sites"]] == ["north", "south"] == list(summary["sites"])
    for site in found["sites"]:
        claim, plan = summary["sites"][site["site"]]["privacy"], site["privacy"]["configured"]
        assert site["rows"] == site["privacy"]["units"] == claim["units"]
        assert site["privacy"]["delta"] == claim["delta"] and site["clipping_norm"] == claim["clipping_norm"]
        assert plan["epsilon_pld"] == pytest.approx(claim["epsilon"], rel=1e-9)
        for name in ("noise_multiplier", "sampling_probability", "steps"):
            assert plan[name] == claim[name]
        assert site["minutes"] is None
    assert found["largest_epsilon"] == max(site["privacy"]["epsilon"] for site in summary["sites"].values())
    assert found["peak_memory_bytes"] is None
    for way in ("up", "down"):  # headers come on top, and joining
        adapters = sum(site[f"bytes_{way}"] for site in found["sites"])
        assert adapters < summary["bytes"][way] < adapters + 100_000


def test_other_settings_are_the_forecast_of_those_settings(capsys: pytest.CaptureFixture[str]) -> None:
    changes = {
        "half the rank": "adapter.r=2",
        "twice the rounds": "federation.rounds=4",
        "half the batch": "training.per_device_train_batch_size=8",
    }
    for site in forecast(capsys, "--no-measure")["sites"][:1]:
        others = {plan["change"]: plan for plan in site["privacy"]["alternatives"]}
        for change, override in changes.items():
            there = forecast(capsys, override, "--no-measure")["sites"][0]["privacy"]["configured"]
            assert {**there, "change": change} == others[change]


def test_a_target_is_met_as_the_site_will_meet_it(capsys: pytest.CaptureFixture[str]) -> None:
    private = "privacy={unit: record, target_epsilon: 3}"
    (site, *_) = forecast(capsys, private, "--no-measure")["sites"]
    plan = site["privacy"]["configured"]
    made = private_plan(load_run(Path("tiny.yaml"), [private]), site["rows"])
    assert plan["noise_multiplier"] == made.noise_multiplier and site["privacy"]["delta"] == made.delta
    done = PrivacyEvent(
        sampling_probability=made.sampling_probability, noise_multiplier=made.noise_multiplier, steps=4
    )
    assert plan["epsilon_pld"] == epsilon([done], made.delta) <= 3


def test_a_site_measures_on_its_own_rows(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    found = forecast(
        capsys, "privacy.unit=group", "privacy.max_records_per_group=2", "--site-file", "site.yaml"
    )
    (site,) = found["sites"]
    assert site["unit"] == "group" and site["privacy"]["units"] < site["rows"]
    assert site["minutes"] > 0 and found["peak_memory_bytes"] > 0 and found["device"] == "cpu"
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert run(["forecast", "tiny.yaml", "--site-file", "site.yaml", *QUIET]) == 0
    said = capsys.readouterr().out
    assert "minutes of training" in said and "memory: " in said and "twice the batch" in said


@pytest.mark.parametrize("cap", [100.0, 3.0])
def test_the_ledger_is_counted_in(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_bert: Path, cap: float
) -> None:
    """What the forecast says the budget will come to is what the ledger has after the run."""
    kit = write_folder(
        tmp_path / "kit", tiny_bert, privacy_budgets=[{"data": "notes", "max_epsilon": cap, "delta": 1e-5}]
    )
    protects = protected_data(kit.config, kit.path, "notes", None)
    earlier = PrivacyEvent(sampling_probability=0.1, noise_multiplier=0.9, steps=7)
    ledger = open_ledger(kit)
    ledger.commit(ledger.reserve(key(1), "notes", protects, earlier), answer(1))
    ledger.close()
    before = {path: path.read_bytes() for path in kit.path.rglob("*") if path.is_file()}

    at_site = [KIT_LABELS, "--no-measure", "--site-file", str(kit.path / "site.yaml")]
    (site,) = forecast(capsys, *at_site)["sites"]
    assert {path: path.read_bytes() for path in before} == before, "SQLite may add its own two files"
    (budget,) = site["budgets"]
    plan = site["privacy"]["configured"]
    run_event = {name: plan[name] for name in ("sampling_probability", "noise_multiplier", "steps")}
    assert (budget["entries"], budget["max_epsilon"]) == (1, cap)
    assert budget["spent"] == epsilon([earlier], 1e-5)
    assert budget["after"] == epsilon([earlier, PrivacyEvent(**run_event)], 1e-5)
    assert max(budget["spent"], plan["epsilon_pld"]) < budget["after"] < budget["spent"] + plan["epsilon_pld"]
    assert budget["alternatives"]["half the rounds"] < budget["after"]
    assert budget["alternatives"].keys() == {each["change"] for each in site["privacy"]["alternatives"]}
    if cap < budget["after"]:
        assert "it would be" in site["refusal"] and f"may spend epsilon {cap:g}" in site["refusal"]
    else:
        assert site["refusal"] is None

    ledger = open_ledger(kit)  # the run, a round at a time
    one = PrivacyEvent(**{**run_event, "steps": plan["steps"] // 2})
    for round in (1, 2):
        ledger.commit(ledger.reserve(key(round, "this run"), "notes", protects, one), answer(round))
    total = Budgets(kit.config, kit.path, epsilon).spent(
        kit.config.policy.privacy_budgets[0], ledger.reservations
    )
    ledger.close()
    assert epsilon(total, 1e-5) == pytest.approx(budget["after"], rel=1e-6)
    capsys.readouterr()
    assert run(["forecast", "tiny.yaml", *at_site]) == 0
    assert ("this site would refuse" in capsys.readouterr().out) == (cap == 3.0)


def test_a_damaged_ledger_is_not_forecast_from(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_bert: Path
) -> None:
    kit = write_folder(tmp_path / "kit", tiny_bert)
    protects = protected_data(kit.config, kit.path, "notes", None)
    ledger = open_ledger(kit)
    ledger.reserve(
        key(1), "notes", protects, PrivacyEvent(sampling_probability=1, noise_multiplier=9, steps=1)
    )
    ledger.close()
    (kit.ledger / DATABASE).unlink()
    at_site = [KIT_LABELS, "--no-measure", "--site-file", str(kit.path / "site.yaml")]
    assert run(["forecast", "tiny.yaml", *at_site, *QUIET]) == 2
    assert "the privacy ledger is not what was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "noise",
    [
        "{target_epsilon: 4, participation_hidden: true}",
        "{noise_multiplier: 0.02, adaptive_quantile: 0.5}",
    ],
)
def test_site_level_privacy_claims_what_was_forecast(capsys: pytest.CaptureFixture[str], noise: str) -> None:
    private = [
        f"privacy={{unit: client, delta: 1e-3, {noise[1:]}",
        "aggregation={name: fedavg, weighting: uniform}",
        "federation.sites_per_round=1",
    ]
    found = forecast(capsys, *private, "--no-measure")
    assert run(["simulate", "tiny.yaml", *private, "-o", "out", *QUIET]) == 0
    claim, plan = json.loads(Path("out/summary.json").read_text())["client_privacy"], found["configured"]
    assert plan["epsilon"] == pytest.approx(claim["planned_epsilon"]) and found["delta"] == claim["delta"]
    for name in ("noise_multiplier", "sum_multiplier", "noise_on_mean", "sampling_probability"):
        assert plan[name] == claim[name], name
    assert (found["sites"], plan["trained_values"]) == (claim["sites"], claim["values"])

    changes = {"half the rank": "adapter.r=2", "twice the rounds": "federation.rounds=4"}
    others = {other["change"]: other for other in found["alternatives"]}
    for change, override in changes.items():
        there = forecast(capsys, *private, override, "--no-measure")["configured"]
        assert {**there, "change": change} == others[change]
    assert others["twice the sites in a round"]["expected_cohort"] == 2
    assert run(["forecast", "tiny.yaml", *private, *QUIET]) == 0
    said = capsys.readouterr().out
    assert "noise on mean" in said and "minutes of training of all sites" in said
    assert run(["forecast", "tiny.yaml", *private, "--site-file", "site.yaml", *QUIET]) == 2
    assert "one site cannot forecast it" in capsys.readouterr().err


def test_noise_for_no_epsilon_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    found = forecast(capsys, "privacy.noise_multiplier=1e-3", "--no-measure")
    assert found["largest_epsilon"] == "Infinity"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("privacy=null", "privacy: the run has no such section"),
        (
            "privacy={unit: client, noise_multiplier: 1, delta: 1}",
            "privacy.delta",
        ),
        ("privacy.unit=group", "does not say whose row each is"),
        ("privacy.delta=0.5", "site north: "),
    ],
)
def test_what_cannot_be_forecast(capsys: pytest.CaptureFixture[str], override: str, message: str) -> None:
    more = ["aggregation={name: fedavg, weighting: uniform}"] if "client" in override else []
    assert run(["forecast", "tiny.yaml", override, *more, "--no-measure", *QUIET]) == 2
    assert message in capsys.readouterr().err
