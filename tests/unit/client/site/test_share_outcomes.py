"""evaluation.share_outcomes false: sites send nothing of what a model gets right and wrong on their rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engines import answer_all
from pydantic import ValidationError

from quorate.client.site.site import Site
from quorate.server.exchange.join import request
from quorate.server.rounds.run import Run
from quorate.shared.protocol.messages import Update
from quorate.simulations.runner import simulate

WITHHELD = {"share_outcomes": False}
PRIVATE = {"unit": "record", "noise_multiplier": 1.0, "delta": 1e-3}


def test_no_outcome_is_asked_for_or_sent(play: Any) -> None:
    seen: list[Update] = []

    def note(update: Update) -> Update:
        seen.append(update)
        return update

    result, records, _, _ = play(note, federation={"rounds": 3}, evaluation=WITHHELD)
    assert {update.header.phase for update in seen} == {"join", "start", "fit"}
    assert all(update.header.outcomes is None for update in seen)
    assert [record.round for record in records] == [1, 2, 3] and result.progress.best_round is None


@pytest.mark.parametrize("privacy", [None, PRIVATE], ids=["plain", "private"])
def test_the_last_round_is_the_result_and_nothing_is_measured(
    make_run: Any, make_sites: Any, tmp_path: Path, privacy: Any
) -> None:
    run = make_run(evaluation=WITHHELD, privacy=privacy)
    summary = simulate(run, make_sites(north=12, south=9), tmp_path / "out")
    assert summary.status == "done" and summary.best.round == summary.rounds == 2
    for measured in (summary.best, summary.final):
        assert measured.validation is None and measured.test is None
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["validation"] for line in lines] == [None, None]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "sites send no outcomes (evaluation.share_outcomes)" in page and "is the best" not in page
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert "that of round 2, the last" in card and "has sites send no outcomes" in card


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_site_refuses_a_coordinator_that_asks_all_the_same(
    make_run: Any, make_sites: Any, tmp_path: Path, split: Any
) -> None:
    site = Site(make_sites(north=9))
    for evaluation, error in ((WITHHELD, "policy-privacy"), ({}, None)):
        run = Run(site.prepare(make_run(evaluation=evaluation)), tmp_path, "0" * 16)
        (joined,) = answer_all(site, [request(run, 0, "join", "north")])
        (answer,) = answer_all(site, [request(run, 1, "evaluate", "north", joined.arrays, split)])
        assert answer.header.error == error
        assert (answer.header.outcomes is None) == (error is not None)


@pytest.mark.parametrize(
    "needs",
    [
        {"early_stopping_patience": 2},
        {"metric_for_best_model": "accuracy"},
        {"references": ["local_only"]},
    ],
    ids=lambda needs: next(iter(needs)),
)
def test_what_needs_outcomes_is_refused(make_run: Any, needs: dict[str, Any]) -> None:
    make_run(evaluation=needs)
    with pytest.raises(ValidationError) as caught:
        make_run(evaluation={**WITHHELD, **needs})
    (found,) = caught.value.errors()
    assert (found["loc"], found["type"]) == (("evaluation",), "value_error")
    assert all(fact in found["msg"] for fact in (*needs, "share_outcomes"))
