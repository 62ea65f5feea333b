"""The head from one exchange: the pooled ridge on the frozen model's features, whoever is missing or lies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from closed_form import ANALYTIC, by_least_squares, plain_features
from refusals import refuses
from tampered import NAMES, SIZES, Tampered, described, edited, only, spoiled, untouched

from quorate.client.site.site import Site
from quorate.server.report import write_report
from quorate.server.results.complete import complete_run
from quorate.server.rounds.loop import run_rounds
from quorate.server.rounds.run import METRICS_FILE, RECORD_FILE, Run, read_jsonl
from quorate.server.tracking.events import EVENTS_FILE, EventsReader, HeadSolved
from quorate.server.tracking.records import RoundMetrics, RoundRecord, SolvedHead
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import AdapterError, QuorumNotMet
from quorate.shared.protocol.messages import Update
from quorate.shared.tasks.task import Row
from quorate.simulations.runner import simulate

WEIGHT, BIAS = "base_model.model.classifier.weight", "base_model.model.classifier.bias"
STILL = {"training": {"learning_rate": 1e-20}}
"""No step moves anything: what a round measures is what it began from."""
TOLD = ("heart", "liver", "lung")


def head_sent(grid: Tampered) -> np.ndarray:
    """The head [features + 1, outputs] that sites were sent to begin round 1 with."""
    sent = next(r.arrays for r in grid.requests if r.header.phase == "fit" and r.header.round == 1)
    return np.vstack([sent[WEIGHT].T, sent[BIAS][None]])


def scale(head: SolvedHead) -> float:
    return 8.0 * min(max(head.slope, 0.1), 1.0)


def closed_form(run: Run, rows: list[Any], head: SolvedHead, weights: Any = None) -> np.ndarray:
    y = np.eye(3)[[row.values["label"] for row in rows]]
    w = np.ones(len(rows)) if weights is None else np.array(weights)
    return scale(head) * by_least_squares(plain_features(run.config, rows), y, w, head.strength)


def train_rows(sites: Any, *without: str) -> list[Any]:
    return [row for name, splits in sites.items() if name not in without for row in splits["train"]]


def first(run: Run) -> Any:
    return read_jsonl(run.output_dir / RECORD_FILE, RoundRecord)[0]


def test_sites_begin_from_the_pooled_ridge(play: Any, make_sites: Any) -> None:
    _, records, grid, run = play(adapter=ANALYTIC)
    head = records[0].head
    expected = closed_form(run, train_rows(make_sites(**SIZES)), head)
    np.testing.assert_allclose(head_sent(grid), expected, rtol=0, atol=2e-4)
    assert np.abs(expected).max() > 1, "of a size at which that says something"
    assert head.rows == SIZES and head.excluded == {} and head.validation_rows == 27
    sums = {u.header.site: len(u.encoded) for u in grid.updates if u.header.phase == "statistics"}
    assert head.bytes_up == sums and head.bytes_down.keys() == SIZES.keys()
    assert all(not r.arrays for r in grid.requests if r.header.phase == "statistics")


def test_a_random_head_asks_nothing(play: Any) -> None:
    _, records, grid, _ = play(adapter={"head": {}})
    assert records[0].head is None
    assert not [r for r in grid.requests if r.header.phase == "statistics"]


def test_one_site_with_all_rows_begins_where_many_do(play: Any, make_sites: Any) -> None:
    sites = make_sites(**SIZES)
    together = {
        split: [row for splits in sites.values() for row in splits[split]]
        for split in ("train", "validation", "test")
    }
    many, one = (
        play(rows=rows, out=name, adapter=ANALYTIC)
        for name, rows in (("many", sites), ("one", {"everybody": together}))
    )
    assert many[1][0].head.strength == one[1][0].head.strength
    np.testing.assert_allclose(head_sent(many[2]), head_sent(one[2]), rtol=0, atol=2e-4)


def test_listed_weights_count_and_dropout_does_not(play: Any, make_sites: Any) -> None:
    given = (0.5, 1.0, 3.0)
    _, records, grid, run = play(
        task={"class_weights": given}, adapter={**ANALYTIC, "lora_dropout": 0.5}, training={"bf16": True}
    )
    rows = train_rows(make_sites(**SIZES))
    weights = [given[row.values["label"]] for row in rows]
    expected = closed_form(run, rows, records[0].head, weights)
    np.testing.assert_allclose(head_sent(grid), expected, rtol=0, atol=2e-4)
    plain = closed_form(run, rows, records[0].head)
    assert np.abs(expected - plain).max() > 0.05


def relabelled(sites: Any, label: Callable[[int, int], Any]) -> Any:
    """The sites' rows with `label` of the label and the place of each."""
    return {
        name: {
            split: [
                Row({**row.values, "label": label(row.values["label"], at)}, row.source)
                for at, row in enumerate(rows)
            ]
            for split, rows in splits.items()
        }
        for name, splits in sites.items()
    }


@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_several_labels_at_once(play: Any, make_sites: Any, weights: str) -> None:
    rows = relabelled(make_sites(**SIZES), lambda label, at: [label, (label + 1) % 3] if at % 3 else [])
    task = {"problem_type": "multi_label_classification", "class_weights": weights}
    _, records, grid, run = play(rows=rows, adapter=ANALYTIC, task=task)
    assert records[0].head.excluded == {}, "balanced weights pass the check as well"
    pooled = train_rows(rows)
    y = np.array([[1.0 if c in row.values["label"] else -1.0 for c in range(3)] for row in pooled])
    x, head = plain_features(run.config, pooled), records[0].head
    expected = scale(head) * by_least_squares(x, y, np.ones(len(x)), head.strength)
    same = np.abs(head_sent(grid) - expected).max() < 2e-4
    assert same == (weights == "none")


def test_numbers(make_run: Any, make_sites: Any, tmp_path: Path) -> None:
    rows = relabelled(make_sites(**SIZES), lambda label, at: 10.0 * label - at)
    task = {"name": "sequence_regression", "max_length": 24, "target_mean": 5.0, "target_scale": 9.0}
    config = RunConfig.model_validate({**make_run(adapter=ANALYTIC).model_dump(), "task": task})
    site = Site(rows)
    run, grid = Run.open(site.prepare(config), tmp_path / "out"), Tampered(site, untouched)
    run_rounds(grid, run, NAMES)
    pooled = train_rows(rows)
    y = np.array([[(row.values["label"] - 5.0) / 9.0] for row in pooled])
    x = plain_features(run.config, pooled)
    expected = by_least_squares(x, y, np.ones(len(x)), first(run).head.strength)
    np.testing.assert_allclose(head_sent(grid), expected, rtol=0, atol=2e-4)


def telling(sites: Any) -> Any:
    """The sites' rows cut to the word that gives the label away and a little: a linear head finds it."""
    return {
        name: {
            split: [
                Row(
                    {**row.values, "text": f"{TOLD[row.values['label']]} {row.values['text'][:4]}"},
                    row.source,
                )
                for row in rows
            ]
            for split, rows in splits.items()
        }
        for name, splits in sites.items()
    }


def test_it_begins_with_a_better_model(play: Any, make_sites: Any) -> None:
    losses, rows = {}, telling(make_sites(north=30, south=20, west=40))
    for init in ("random", "analytic"):
        _, _, _, run = play(rows=rows, out=init, adapter={"head": {"init": init}}, **STILL)
        (metrics,) = read_jsonl(run.output_dir / METRICS_FILE, RoundMetrics)
        losses[init] = metrics.validation.pooled["loss"]
    assert losses["analytic"] < 0.2 * losses["random"]


def test_who_cannot_is_left_out_exactly_and_named(
    play: Any, make_sites: Any, caplog: pytest.LogCaptureFixture
) -> None:
    _, records, grid, run = play(
        only("south", lambda u: edited(u, error="policy-statistics"), "statistics"), adapter=ANALYTIC
    )
    head = records[0].head
    assert head.excluded["south"].code == "policy-statistics" and "south" not in head.rows
    expected = closed_form(run, train_rows(make_sites(**SIZES), "south"), head)
    np.testing.assert_allclose(head_sent(grid), expected, rtol=0, atol=2e-4)
    assert set(records[0].weights) == set(SIZES), "it takes part all the same"
    assert "south is not in the solved head: its policy lets no sums over its rows leave" in caplog.text


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Update], Update]:
    def lie(update: Update) -> Update:
        return edited(update, update.arrays.updated({name: change(update.arrays[name].copy())}))

    return lie


def scaled(update: Update) -> Update:
    """Sums over features that are a thousand times as large, and over as many rows."""
    arrays = dict(update.arrays)
    size = len(arrays["train.gram"])
    scale = np.append(np.full(size - 1, 1e3), 1.0)
    arrays["train.gram"] = arrays["train.gram"] * np.outer(scale, scale)
    arrays["train.cross"] = arrays["train.cross"] * scale[:, None]
    return edited(update, Adapter(arrays))


def apart(update: Update) -> Update:
    """Targets where the rows' features hardly go; each product by itself is one that rows may have."""
    gram, squares = update.arrays["train.gram"], update.arrays["train.squares"]
    bound = np.outer(np.sqrt(np.diag(gram)), np.sqrt(squares))
    away = np.sign(np.linalg.eigh(gram)[1][:, :1]) * bound
    return edited(update, update.arrays.updated({"train.cross": away}))


def loud(update: Update) -> Update:
    """Targets of 5 where others have 1: as good as five times the weight."""
    factors = {"train.cross": 5.0, "train.squares": 25.0}
    return edited(update, update.arrays.map(lambda name, array: array * factors.get(name, 1.0)))


def asymmetric(gram: np.ndarray) -> np.ndarray:
    gram[0, 1] += 1e-9
    return gram


HOSTILE: dict[str, tuple[Callable[[Update], Any], str]] = {
    "nothing": (lambda u: edited(u, Adapter({})), "adapter"),
    "float32": (lambda u: edited(u, u.arrays.map(lambda _, a: a.astype(np.float32))), "adapter"),
    "nan": (spoiled, "non-finite"),
    "an array more": (lambda u: edited(u, u.arrays.updated({"train.more": np.zeros(2)})), "adapter"),
    "asymmetric": (changed("train.gram", asymmetric), "protocol"),
    "weight": (changed("train.gram", lambda gram: 1e6 * gram), "protocol"),
    "rows": (lambda u: edited(u, num_examples=10**6), "rows"),
    "targets": (changed("train.cross", lambda cross: 1e30 * cross), "protocol"),
    "direction": (apart, "protocol"),
    "loud": (loud, "protocol"),
    "validation": (changed("validation.gram", lambda gram: -gram), "protocol"),
    "validation rows": (changed("validation.squares", lambda squares: 0 * squares), "protocol"),
    "scale": (scaled, "norm"),
    "rubbish": (lambda _: b"rubbish", "protocol"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_sums_that_cannot_be_are_set_aside(play: Any, make_sites: Any, kind: str) -> None:
    change, code = HOSTILE[kind]
    _, records, grid, run = play(only("south", change, "statistics"), adapter=ANALYTIC)
    head = records[0].head
    assert {site: why.code for site, why in head.excluded.items()} == {"south": code}
    expected = closed_form(run, train_rows(make_sites(**SIZES), "south"), head)
    np.testing.assert_allclose(head_sent(grid), expected, rtol=0, atol=2e-4)


def boasting(update: Update) -> Update:
    """What a site sends that says it has 10^9 training rows, and sums as large as those would have."""
    header, many = update.header, 10**9
    if header.site != "south" or header.phase not in ("join", "statistics"):
        return update
    if header.description is not None:
        return described(update, rows={**header.description.rows, "train": many})
    factors = {name: many / SIZES["south"] if name.startswith("train") else 1.0 for name in update.arrays}
    return edited(update, update.arrays.map(lambda name, a: a * factors[name]), num_examples=many)


@pytest.mark.parametrize("share", [0.5, None])
def test_a_claim_of_rows_buys_half_of_the_head_at_most(
    play: Any, make_sites: Any, share: float | None
) -> None:
    _, records, grid, run = play(boasting, adapter=ANALYTIC, federation={"max_weight_share": share})
    head, sites = records[0].head, make_sites(**SIZES)
    assert head.excluded == {} and head.rows["south"] == 10**9 and head.validation_rows == 27
    south = (12 + 5 if share else 10**9) / SIZES["south"]
    weights = [south if name == "south" else 1.0 for name, size in SIZES.items() for _ in range(size)]
    expected = closed_form(run, train_rows(sites), head, weights)
    np.testing.assert_allclose(head_sent(grid), expected, rtol=0, atol=2e-4)


def test_without_a_quorum_there_is_no_run(play: Any) -> None:
    result, records, _, _ = play(
        only("south", lambda u: edited(u, error="data"), "statistics"),
        adapter=ANALYTIC,
        federation={"quorum": 3},
    )
    assert isinstance(result.stopped, QuorumNotMet) and records == []
    assert result.stopped.kind == "quorum-of-sums" and "south: could not use" in str(result.stopped)


def test_rows_without_weight_are_said(play: Any) -> None:
    with refuses(AdapterError, "rows-without-weight"):
        play(adapter=ANALYTIC, task={"class_weights": [0.0, 0.0, 0.0]})


def test_it_is_told_and_kept(play: Any, make_sites: Any) -> None:
    result, records, grid, run = play(
        only("south", lambda u: edited(u, error="policy-statistics"), "statistics"), adapter=ANALYTIC
    )
    told = [e for e in EventsReader(run.output_dir / EVENTS_FILE).read() if isinstance(e, HeadSolved)]
    assert [event.head for event in told] == [records[0].head]
    summary = complete_run(grid, run, result)
    assert summary.head == records[0].head and summary.excluded == {}
    up = sum(sum(record.bytes_up.values()) for record in records)
    assert summary.bytes["up"] == up, "the rounds' alone"
    page = write_report(run.output_dir).read_text().replace("\u00a0", " ")
    assert "the head was solved from sums over 17 training rows of 2 sites, without south" in page


def test_a_run_that_is_killed_before_round_1_asks_again_and_ends_alike(
    make_run: Any, make_sites: Any, tmp_path: Path
) -> None:
    config, ends = make_run(adapter=ANALYTIC), {}

    def kill(update: Update) -> Update:
        raise KeyboardInterrupt

    for name, changes in {
        "whole": [untouched],
        "before": [only("south", kill, "fit", 1), untouched],
        "after": [only("south", kill, "fit", 2), untouched],
    }.items():
        asked = 0
        for change in changes:
            site = Site(make_sites(**SIZES))
            run = Run.open(site.prepare(config), tmp_path / name, resume=change is not changes[0])
            grid = Tampered(site, change)
            result = run_rounds(grid, run, NAMES)
            asked += sum(r.header.phase == "statistics" for r in grid.requests)
        assert result.status == "done" and asked == {"whole": 3, "before": 6, "after": 3}[name]
        assert first(run).head is not None
        summary = complete_run(grid, run, result)
        assert summary.head is not None and summary.head.rows == SIZES
        ends[name] = result.state.adapter.content_hash
    assert len(set(ends.values())) == 1


def test_references_begin_from_heads_of_their_own_rows(
    make_run: Any, make_sites: Any, tmp_path: Path
) -> None:
    """Else the federation would be praised for its start."""
    references = {"references": ["local_only", "centralised"], "bootstrap_samples": 0}
    config = make_run(adapter=ANALYTIC, evaluation=references, federation={"rounds": 1}, **STILL)
    rows = telling(make_sites(north=24, south=36))
    rows["north"]["train"] = [row for row in rows["north"]["train"] if row.values["label"]]  # never the first
    summary = simulate(config, rows, tmp_path / "out")
    found = summary.references
    assert found is not None and found.failed == {} and found.centralised is not None
    assert summary.best is not None and summary.best.test is not None and found.centralised.test is not None
    ours, central = (each.test.pooled["accuracy"] for each in (summary.best, found.centralised))
    assert central == ours > 0.95, "all rows in one place solve the same head"
    alone = {name: each.test.pooled["accuracy"] for name, each in found.local_only.items() if each.test}
    assert 0.5 < alone["north"] < 0.8 < alone["south"], "a head too, of its own rows"
