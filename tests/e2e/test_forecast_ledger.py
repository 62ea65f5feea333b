"""`quorate forecast --site-file`: what a run would bring the site's ledger to is what it then has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forecasts import QUIET, SITE, forecast, write_tiny
from ledgers import answer, key
from site_folder import write_folder

from quorate.client.privacy.budgets import Budgets, protected_data
from quorate.client.privacy.ledger import DATABASE, open_ledger
from quorate.deploy.cli import run
from quorate.shared.privacy.accounting import epsilon
from quorate.shared.privacy.privacy_event import PrivacyEvent

KIT_LABELS = "task.labels=[cardiac, hepatic, pulmonary]"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path, tiny_bert)
    return tmp_path


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
    assert site["ledger"] == str(kit.ledger / DATABASE)
    assert set(site["refused"]) == {change for change, after in budget["alternatives"].items() if after > cap}
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
    said = capsys.readouterr().out
    assert ("this site would refuse" in said) == (cap == 3.0)
    assert ("refused" in said) == (cap == 3.0) and "epsilon of what the ledger has and this run" in said


def test_data_without_a_budget_have_spent_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_bert: Path
) -> None:
    """And as long as there is no ledger, a forecast makes none."""
    kit = write_folder(tmp_path / "kit", tiny_bert)
    at_site = [KIT_LABELS, "--no-measure", "--site-file", str(kit.path / "site.yaml")]
    before = set(kit.path.rglob("*"))
    (site,) = forecast(capsys, *at_site)["sites"]
    assert set(kit.path.rglob("*")) == before
    (fresh,) = site["budgets"]
    plan = site["privacy"]["configured"]
    assert (fresh["entries"], fresh["spent"], fresh["max_epsilon"]) == (0, 0, None)
    assert fresh["delta"] == site["privacy"]["delta"] and fresh["after"] == plan["epsilon_pld"]
    assert (site["refusal"], site["refused"]) == (None, [])

    protects = protected_data(kit.config, kit.path, "notes", None)
    by_group = protects.model_copy(update={"group": "patient"})
    earlier = PrivacyEvent(sampling_probability=0.1, noise_multiplier=0.9, steps=7)
    ledger = open_ledger(kit)
    for round, data in enumerate((protects, by_group), start=1):
        ledger.commit(ledger.reserve(key(round), "notes", data, earlier), answer(round))
    ledger.close()
    ((used,),) = (each["budgets"] for each in forecast(capsys, *at_site)["sites"])
    run_event = {name: plan[name] for name in ("sampling_probability", "noise_multiplier", "steps")}
    assert used["entries"] == 1, "groups are another account"
    assert used["after"] == epsilon([earlier, PrivacyEvent(**run_event)], used["delta"]) > fresh["after"]
    assert run(["site", "ledger", "show", str(kit.path), "--json", *QUIET]) == 0
    shown = json.loads(capsys.readouterr().out)["accounts"]
    assert used["spent"] in [account["epsilon"] for account in shown if account["group"] is None]
    assert run(["forecast", "tiny.yaml", *at_site, *QUIET]) == 0
    said = capsys.readouterr().out
    assert "none" in said and "comes on top" not in said


def test_without_a_ledger_that_is_said(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    policy = "policy: {privacy_budgets: [{data: notes, max_epsilon: 9, delta: 1e-5}]}\n"
    (folder / "site.yaml").write_text(SITE + policy)
    (site,) = forecast(capsys, "--no-measure", "--site-file", "site.yaml")["sites"]
    assert site["ledger"] is None and site["budgets"][0]["spent"] == 0
    assert run(["forecast", "tiny.yaml", "--no-measure", "--site-file", "site.yaml", *QUIET]) == 0
    assert "what earlier runs on the same rows spent comes on top" in capsys.readouterr().out


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
