"""site.yaml and the data are those on disk: rules at every request, rows when a run begins."""

from __future__ import annotations

import json
import logging
from functools import partial
from typing import Any

import pytest
from site_folder import RUN_ID, request
from whole_site import WholeSite

from quorate.client.health.site_check import check
from quorate.client.health.site_file import site_file_state
from quorate.client.health.site_status import site_status
from quorate.client.policy.approvals import approve
from quorate.client.process import reload
from quorate.server.exchange.exclusions import REASONS
from quorate.shared.privacy.claim import PrivacyClaim
from quorate.shared.process.files import take_lock

OTHER = "f" * 16


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(reload, "SETTLE_SECONDS", 0.0)
    caplog.set_level(logging.INFO, "quorate")


@pytest.fixture
def site(make_site: Any) -> WholeSite:
    whole: WholeSite = make_site()
    return whole


@pytest.fixture
def pinned(pinned: Any) -> Any:
    return partial(pinned, federation={"rounds": 5})


def drop_rows(site: WholeSite, count: int) -> None:
    """As a person does who takes patients' rows out of the file."""
    path = site.folder.path / "notes.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-count]) + "\n")


def joined(site: WholeSite, run: Any, run_id: str = RUN_ID) -> dict[str, int]:
    description = site.ask(request(run, "join", 0, run_id=run_id)).header.description
    assert description is not None
    return dict(description.rows)


def test_a_rule_that_is_tightened_holds_for_the_next_round(site: Any, pinned: Any, caplog: Any) -> None:
    assert site.ask(request(pinned())).header.error is None
    site.configure(max_rank=3)
    update = site.ask(request(pinned(), round=2))
    assert (update.header.error, len(update.arrays)) == ("policy-rank", 0)
    assert "policy.max_rank: 64, now 3" in caplog.text
    site.configure(max_rank=4)
    assert site.ask(request(pinned(), round=2)).header.error is None, "and so does one that is loosened"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda content: content.update(models=[]), "policy-model"),
        (lambda content: content["policy"].update(data=[]), "policy-data"),
        (lambda content: content["policy"].update(tasks=["causal_lm"]), "policy-task"),
        (lambda content: content["policy"].update(aggregation=["ffa"]), "policy-aggregation"),
        (lambda content: content["policy"].update(min_rows=10_000), "policy-rows"),
        (lambda content: content["policy"].update(require_privacy=True), "policy-privacy"),
        (lambda content: content["policy"].update(approve_each_run=True), "policy-approval"),
        (lambda content: content["policy"].update(max_rounds=4), "policy-rounds"),
        (
            lambda content: content["policy"].update(
                privacy_budgets=[{"data": "notes", "max_epsilon": 1.0, "delta": 1e-5}]
            ),
            "policy-privacy",
        ),
        (lambda content: content["data"]["notes"].update(source="elsewhere.csv"), "data"),
    ],
)
def test_every_rule_is_read_again(site: Any, pinned: Any, change: Any, code: str) -> None:
    assert joined(site, pinned())["train"] == 58
    site.rewrite(change)
    assert site.ask(request(pinned())).header.error == code
    assert site.steps == 0 and code in REASONS


def test_a_privacy_budget_that_is_added_is_kept(site: Any, pinned: Any) -> None:
    run = pinned(privacy={"unit": "record", "noise_multiplier": 1.0})
    assert site.ask(request(run)).header.error is None
    site.configure(privacy_budgets=[{"data": "notes", "max_epsilon": 0.01, "delta": 1e-5}])
    assert site.ask(request(run, round=2)).header.error == "policy-budget"


def test_a_broken_file_refuses_everything_and_never_falls_back(site: Any, pinned: Any, caplog: Any) -> None:
    path = site.folder.path / "site.yaml"
    good = path.read_text()
    assert site.ask(request(pinned())).header.error is None
    for broken in ("policy: [", good.replace("max_rank", "max_rnak"), "", None):
        if broken is None:
            path.unlink()
        else:
            path.write_text(broken)
        for phase, round in (("join", 0), ("fit", 2), ("evaluate", 1)):
            caplog.clear()
            assert site.ask(request(pinned(), phase, round)).header.error == "site-file"
            assert "until site.yaml is mended" in caplog.text
    assert "max_rnak" not in REASONS["site-file"] and site.steps == 3
    path.write_text(good)
    assert site.ask(request(pinned(), round=2)).header.error is None


def test_a_file_that_is_being_written_is_waited_for(
    site: Any, pinned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = site.folder.path / "site.yaml"
    site.configure(max_rank=3)
    whole = path.read_text()
    begin = whole[: whole.index("policy:")]
    path.write_text(begin)  # valid by itself, and without the rules

    def meanwhile(_seconds: float) -> None:
        path.write_text(whole)

    monkeypatch.setattr(reload.time, "sleep", meanwhile)
    assert site.ask(request(pinned())).header.error == "policy-rank"


def test_a_row_that_is_taken_out_is_not_trained_on_in_the_next_run(
    site: Any, pinned: Any, caplog: Any
) -> None:
    assert joined(site, pinned()) == {"train": 58, "validation": 14, "test": 18}
    assert site.ask(request(pinned())).header.num_examples == 58
    drop_rows(site, 6)
    caplog.clear()
    rows = joined(site, pinned(), OTHER)
    assert sum(rows.values()) == 84 and rows["train"] < 58
    assert "since they were read last: train" in caplog.text and "fewer and" in caplog.text
    update = site.ask(request(pinned(), run_id=OTHER))
    assert update.header.num_examples == rows["train"], "examples too are made anew"
    caplog.clear()
    assert joined(site, pinned(), "e" * 16) == rows and "nothing changed" in caplog.text


def test_a_run_that_is_resumed_reads_again_and_one_that_goes_on_does_not(site: Any, pinned: Any) -> None:
    before = joined(site, pinned())["train"]
    drop_rows(site, 6)
    assert site.ask(request(pinned())).header.num_examples == before, "rows are those that it joined with"
    assert joined(site, pinned())["train"] < before
    assert site.ask(request(pinned(), round=2)).header.num_examples < before


def test_a_run_that_is_refused_does_not_change_the_rows_of_another(site: Any, pinned: Any) -> None:
    before = joined(site, pinned())["train"]
    drop_rows(site, 6)
    refused = pinned(adapter={"r": 65})
    assert site.ask(request(refused, "join", 0, run_id=OTHER)).header.error == "policy-rank"
    assert site.ask(request(pinned())).header.num_examples == before


def test_a_private_run_is_not_gone_on_with_on_another_number_of_rows(site: Any, pinned: Any) -> None:
    run = pinned(privacy={"unit": "record", "noise_multiplier": 1.0})
    claim = site.ask(request(run, "join", 0)).header.description.privacy
    assert isinstance(claim, PrivacyClaim) and claim.units == 58
    assert site.ask(request(run)).header.error is None
    drop_rows(site, 6)
    assert site.ask(request(run, round=2)).header.error is None, "the claim counts the rows of its beginning"
    assert site.ask(request(run, "join", 0)).header.error == "policy-privacy"
    fresh = site.ask(request(run, "join", 0, run_id=OTHER)).header.description
    assert fresh.privacy.units == fresh.rows["train"] < 58, "a new run is a claim of its own"


def test_data_that_cannot_be_read_any_more_refuse(site: Any, pinned: Any) -> None:
    joined(site, pinned())
    (site.folder.path / "notes.csv").unlink()
    assert site.ask(request(pinned(), "join", 0)).header.error == "data"
    assert site.ask(request(pinned())).header.error == "data", "the rows of before are gone"


def test_another_source_in_the_file_is_another_source_in_the_next_round(site: Any, pinned: Any) -> None:
    joined(site, pinned())
    text = (site.folder.path / "notes.csv").read_text().splitlines()
    (site.folder.path / "fewer.csv").write_text("\n".join(text[:61]) + "\n")
    site.rewrite(lambda content: content["data"]["notes"].update(source="fewer.csv"))
    assert site.ask(request(pinned())).header.num_examples < 58


def test_what_waits_for_a_start_is_said(site: Any, pinned: Any, caplog: Any) -> None:
    lock = (site.folder.state / "site.lock").open("w")
    take_lock(lock.fileno())  # as the process that listens has it
    try:
        assert site_file_state(site.folder).state == "in use"
        site.configure(max_rank=5)
        assert site_file_state(site.folder).state == "changed"
        site.ask(request(pinned()))
        assert site_file_state(site.folder).state == "in use"
        site.rewrite(lambda content: content.update(device="auto", anchor="elsewhere"))
        assert site.ask(request(pinned(), round=2)).header.error is None
        assert "site.yaml: device, anchor changed" in caplog.text
        found = site_status(site.folder).site_file
        assert found is not None and (found.state, found.fields) == ("restart", ("device", "anchor"))
        (line,) = [line for line in check(site.folder.path) if line.what == "site process"]
        assert not line.ok and "device, anchor" in line.found
        site.restart()
        assert site_file_state(site.folder).state == "in use"
    finally:
        lock.close()
    assert site_file_state(site.folder) is None
    assert json.loads((site.folder.state / "site-file.json").read_text())["at_start"] == []


def test_approval_is_asked_for_as_soon_as_the_file_says_so(site: Any, pinned: Any) -> None:
    assert site.ask(request(pinned())).header.error is None
    site.configure(approve_each_run=True)
    assert site.ask(request(pinned(), round=2)).header.error == "policy-approval"
    approve(site.folder.state, RUN_ID)
    assert site.ask(request(pinned(), round=2)).header.error is None
