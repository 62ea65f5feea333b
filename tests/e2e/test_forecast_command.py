"""`quorate forecast`: its figures are those the run then has, and what it cannot forecast it says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from forecasts import QUIET, forecast, write_tiny
from safetensors.torch import load_file, save_file

from quorate.client.trainer.dp.plan import private_plan
from quorate.deploy.cli import run
from quorate.shared.config.load import load_run
from quorate.shared.privacy.accounting import epsilon
from quorate.shared.privacy.privacy_event import PrivacyEvent


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path, tiny_bert)
    return tmp_path


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


UNIFORM = "aggregation={name: fedavg, weighting: uniform}"
"""Which site-level privacy needs."""


@pytest.mark.parametrize(
    ("noise", "cohort"),
    [
        ("target_epsilon: 4, participation_hidden: true", 1),
        ("target_epsilon: 4", 1),
        ("noise_multiplier: 0.02, adaptive_quantile: 0.5", 1),
        pytest.param(
            "noise_multiplier: 0.02, adaptive_quantile: 0.5, participation_hidden: true",
            1,
            marks=pytest.mark.slow,
        ),
        ("target_epsilon: 500, adaptive_quantile: 0.5", None),
    ],
    ids=["hidden", "seen", "adaptive", "adaptive and hidden", "adaptive to a target"],
)
def test_site_level_privacy_claims_what_was_forecast(
    capsys: pytest.CaptureFixture[str], noise: str, cohort: int | None
) -> None:
    # A small norm, or the noise on so few sites may make the training diverge.
    private = [f"privacy={{unit: client, delta: 1e-3, clipping_norm: 1e-3, {noise}}}", UNIFORM]
    private += [] if cohort is None else [f"federation.sites_per_round={cohort}"]
    found = forecast(capsys, *private, "--no-measure")
    assert run(["simulate", "tiny.yaml", *private, "-o", "out", *QUIET]) == 0
    summary = json.loads(Path("out/summary.json").read_text())
    claim, plan = summary["client_privacy"], found["configured"]
    assert plan["epsilon"] == claim["planned_epsilon"] and found["delta"] == claim["delta"]
    assert plan["epsilon"] == pytest.approx(claim["epsilon"]) and plan["releases"] <= claim["releases"]
    for name in ("noise_multiplier", "sum_multiplier", "noise_on_mean", "sampling_probability"):
        assert plan[name] == claim[name], name
    assert (found["sites"], plan["trained_values"]) == (claim["sites"], claim["values"])
    assert (plan["sum_multiplier"] > plan["noise_multiplier"]) == ("adaptive" in noise)
    assert ("noise on the mean update" in (found["warning"] or "")) == (plan["noise_on_mean"] > 1)
    assert (found["device"], found["minutes"], found["peak_memory_bytes"]) == (None, None, None)
    if cohort is None:  # nothing is left to coins, so bytes are those of the run, but for headers
        for way in ("up", "down"):
            assert found[f"bytes_{way}"] < summary["bytes"][way] < found[f"bytes_{way}"] + 100_000


def test_other_settings_of_site_level_privacy(capsys: pytest.CaptureFixture[str]) -> None:
    private = ["privacy={unit: client, delta: 1e-3, noise_multiplier: 0.15, adaptive_quantile: 0.5}", UNIFORM]
    found = forecast(capsys, *private, "--no-measure")
    others = {other["change"]: other for other in found["alternatives"]}
    changes = {
        "half the rank": "adapter.r=2",
        "twice the rank": "adapter.r=8",
        "half the rounds": "federation.rounds=1",
        "twice the rounds": "federation.rounds=4",
    }
    assert others.keys() == changes.keys()
    for change, override in changes.items():
        there = forecast(capsys, *private, override, "--no-measure")["configured"]
        assert {**there, "change": change} == others[change]
    assert found["impossible"].keys() == {"half the sites in a round"}
    assert "adaptive_quantile cannot be kept" in found["impossible"]["half the sites in a round"]
    quorum = forecast(capsys, *private, "federation.quorum=2", "--no-measure")
    assert "federation.quorum 2 is above" in quorum["impossible"]["half the sites in a round"]
    one = forecast(capsys, *private, "privacy.noise_multiplier=0.05", "federation.sites_per_round=1")
    assert one["minutes"] > 0 and one["peak_memory_bytes"] > 0 and one["device"] == "cpu"
    (twice,) = [each for each in one["alternatives"] if each["change"] == "twice the sites in a round"]
    assert twice["expected_cohort"] == 2

    assert run(["forecast", "tiny.yaml", *private, *QUIET]) == 0
    said = capsys.readouterr().out
    for words in ("noise on mean", "minutes of training of all sites", "noise multiplier of the sum"):
        assert words in said
    assert "half the sites in a round cannot be had" in said and "every site takes part" in said
    assert run(["forecast", "tiny.yaml", *private, "--site-file", "site.yaml", *QUIET]) == 2
    assert "one site cannot forecast it" in capsys.readouterr().err


def test_weights_are_left_alone_where_nothing_is_measured(
    capsys: pytest.CaptureFixture[str], tiny_bert: Path, folder: Path
) -> None:
    """Weights that no run would train on do not matter then, and nothing else differs."""
    spoiled = folder / "spoiled"
    shutil.copytree(tiny_bert, spoiled)
    weights = {name: tensor * torch.nan for name, tensor in load_file(spoiled / "model.safetensors").items()}
    save_file(weights, spoiled / "model.safetensors", metadata={"format": "pt"})
    there = f"model.model_name_or_path={spoiled}"
    assert run(["forecast", "tiny.yaml", there, *QUIET]) == 2
    assert "NaN" in capsys.readouterr().err
    for private in ([], ["privacy={unit: client, delta: 1e-3, noise_multiplier: 1}", UNIFORM]):
        measured, quick = forecast(capsys, *private), forecast(capsys, *private, there, "--no-measure")
        for found in (measured, quick):
            for part in (found, *(found["sites"] if isinstance(found["sites"], list) else [])):
                for name in ("minutes", "device", "peak_memory_bytes"):
                    part.pop(name, None)
        assert measured == quick


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
