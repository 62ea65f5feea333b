"""The round loop over grids on which one site drops, delays or spoils what it sends."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tampered import SIZES, edited, only, spoiled

from quorate.server.exchange.join import Members
from quorate.server.rounds.checkpoint import list_checkpoints, load_checkpoint
from quorate.server.rounds.cohort import choose_cohort
from quorate.server.rounds.run import METRICS_FILE, Run, read_jsonl
from quorate.server.tracking.records import RoundMetrics
from quorate.shared.adapters.adapter import LORA_A, LORA_B, Adapter, is_lora_a, lora_layers
from quorate.shared.aggregation.rule import RESIDUAL_A, RESIDUAL_B
from quorate.shared.errors import QuorumNotMet
from quorate.shared.model.lora_model import load_model
from quorate.shared.protocol.messages import Update


def test_without_a_quorum_the_run_stops_and_keeps_its_last_good_round(play: Any) -> None:
    result, records, _, run = play(
        only("south", spoiled, round=2), federation={"rounds": 3, "quorum": 3}, evaluation={"every": 1}
    )
    assert result.status == "quorum-not-met" and isinstance(result.stopped, QuorumNotMet)
    said = str(result.stopped)
    assert "round 2 needs 3 of 3 sites, 2 gave a good update (south: array" in said and "--resume" in said
    assert list_checkpoints(run.output_dir) == [1] and [record.round for record in records] == [1]
    state, progress = load_checkpoint(run.output_dir, 1)
    assert state.stored().content_hash == result.state.stored().content_hash == records[0].state_hash
    assert result.progress == progress


def test_an_interrupt_keeps_what_finished(play: Any) -> None:
    def interrupt(update: Update) -> Update:
        raise KeyboardInterrupt

    result, records, _, run = play(only("north", interrupt, round=2), federation={"rounds": 3})
    assert result.status == "interrupted" and isinstance(result.stopped, KeyboardInterrupt)
    assert list_checkpoints(run.output_dir) == [1] and len(records) == 1


def test_a_site_that_never_replies_costs_the_grace_and_no_more(play: Any) -> None:
    started = time.monotonic()
    _, (record,), _, _ = play(
        only("south", lambda u: None), federation={"quorum": 2, "grace_seconds": 0.3, "timeout_seconds": 60}
    )
    assert 0.3 <= time.monotonic() - started < 20
    assert record.excluded["south"].code == "timeout"
    assert record.excluded["south"].reason == "did not reply in time"
    assert set(record.weights) == {"north", "west"}


def test_a_site_within_the_grace_counts(play: Any) -> None:
    federation = {"quorum": 1, "grace_seconds": 30, "timeout_seconds": 60}
    _, (record,), _, _ = play(late={"south": 2}, federation=federation)
    assert set(record.weights) == set(SIZES) and record.excluded == {}


def test_what_has_arrived_counts_whatever_the_grace(play: Any) -> None:
    _, (record,), _, _ = play(federation={"quorum": 1, "grace_seconds": 0})
    assert set(record.weights) == set(SIZES) and record.excluded == {}


def test_the_timeout_ends_the_wait_for_a_quorum(play: Any) -> None:
    started = time.monotonic()
    result, records, _, _ = play(
        only("south", lambda u: None), federation={"quorum": 3, "grace_seconds": 60, "timeout_seconds": 0.4}
    )
    assert 0.4 <= time.monotonic() - started < 20
    assert isinstance(result.stopped, QuorumNotMet) and records == []
    assert "south: did not reply in time" in str(result.stopped)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"outcomes": None}, "without outcomes"),
        ({"num_examples": 5}, "another number of rows"),
        (
            {"num_examples": 2**53, "outcomes": {"values": ((0, 0),), "counts": (2**53,)}},
            "the site joined with 9",
        ),
        (
            {"outcomes": {"values": ((0, 0),), "counts": (9,), "loss_sum": 1.7e308}},
            "a loss or a sum that no evaluation gives",
        ),
        (
            {"outcomes": {"values": ((0, 0),), "counts": (9,), "sums": {"target": 1.7e308}}},
            "a loss or a sum that no evaluation gives",
        ),
        (
            {"outcomes": {"values": ((0, 0),), "counts": (2**70,), "num_rows": 9}},
            "counts that no evaluation gives",
        ),
        (
            {"outcomes": {"values": ((2**70, 0),), "counts": (9,)}},
            "counts that no evaluation gives",
        ),
        ({"outcomes": {"num_rows": 9}}, "not one per row"),
        ({"outcomes": {"values": ((99, 0),), "counts": (9,)}}, "as this task has them"),
        ({"outcomes": {"values": ((0,),), "counts": (9,)}}, "as this task has them"),
    ],
    ids=["none", "count", "rows", "loss", "sums", "huge", "huge-value", "no-outcomes", "label", "width"],
)
def test_an_impossible_evaluation_is_set_aside(play: Any, header: dict[str, Any], reason: str) -> None:
    def change(update: Update) -> Update:
        fields = {**update.header.model_dump(), **header}
        return Update(type(update.header).model_validate(fields))

    _, (record,), _, run = play(only("south", change, "evaluate"))
    other_rows = "number of rows" in reason or "joined with" in reason  # that says nothing of the model
    assert record.excluded["south"].code == ("rows" if other_rows else "protocol")
    assert reason in record.excluded["south"].reason
    assert set(record.weights) == set(SIZES), "its training counted"
    (metrics,) = read_jsonl(run.output_dir / METRICS_FILE, RoundMetrics)
    assert metrics.validation.rows == {"north": 9, "west": 9}
    assert np.sum(metrics.validation.pooled["confusion"]) == 18


def test_why_training_failed_outlives_why_evaluation_failed(play: Any) -> None:
    def change(update: Update) -> Update:
        if update.header.site != "south" or update.header.phase == "join":
            return update
        return spoiled(update) if update.header.phase == "fit" else edited(update, error="internal")

    _, (record,), _, _ = play(change)
    assert record.excluded["south"].code == "non-finite"


def test_every_round_has_a_line_in_both_files(play: Any) -> None:
    result, records, grid, run = play(federation={"rounds": 3}, evaluation={"every": 2})
    metrics = read_jsonl(run.output_dir / METRICS_FILE, RoundMetrics)
    assert [r.round for r in records] == [m.round for m in metrics] == [1, 2, 3]
    assert [m.validation is not None for m in metrics] == [False, True, True], "every second, and the last"
    for record, line in zip(records, metrics, strict=True):
        assert sum(record.weights.values()) == pytest.approx(1.0)
        assert set(line.train) == set(SIZES) and all(
            np.isfinite(v["train_loss"]) for v in line.train.values()
        )
        assert {"cohort", "train", "aggregate", "evaluate", "checkpoint"} == set(record.seconds)
        assert record.num_steps == dict.fromkeys(SIZES, 3)
        down = Counter()
        for request in grid.requests:
            if request.header.round == record.round:
                down[request.header.site] += len(request.encoded)
        assert record.bytes_down == down
        up = Counter()
        for update in grid.updates:
            if update.header.round == record.round:
                up[update.header.site] += len(update.encoded)
        assert record.bytes_up == up
    assert records[-1].state_hash == result.state.stored().content_hash
    assert len({record.state_hash for record in records}) == 3


def test_weights_are_examples_or_uniform(play: Any) -> None:
    (record,) = play(out="examples")[1]
    assert record.weights == pytest.approx({name: size / 24 for name, size in SIZES.items()})
    (record,) = play(out="uniform", aggregation={"name": "fedavg", "weighting": "uniform"})[1]
    assert record.weights == pytest.approx(dict.fromkeys(SIZES, 1 / 3))


def test_cohorts_are_drawn_by_the_seed(play: Any, make_run: Any, tmp_path: Path) -> None:
    _, records, grid, run = play(federation={"rounds": 4, "sites_per_round": 2})
    names = {name: node for node, name in enumerate(SIZES)}
    members = Members(names, {}, Adapter({}))
    assert [record.cohort for record in records] == [choose_cohort(run, members, r) for r in (1, 2, 3, 4)]
    asked = {(r.header.round, r.header.site) for r in grid.requests if r.header.phase == "fit"}
    assert asked == {(record.round, site) for record in records for site in record.cohort}
    drawn = [choose_cohort(run, members, round) for round in range(1, 301)]
    assert all(len(set(cohort)) == 2 for cohort in drawn)
    counts = Counter(site for cohort in drawn for site in cohort)
    assert all(160 < counts[site] < 240 for site in SIZES), counts
    other = Run(make_run(seed=4, federation={"sites_per_round": 2}), tmp_path, "other")
    assert [choose_cohort(other, members, round) for round in range(1, 301)] != drawn
    everyone = Run(make_run(federation={"sites_per_round": 9}), tmp_path, "all")
    assert choose_cohort(everyone, members, 1) == tuple(sorted(SIZES))


def test_the_earlier_of_two_equal_rounds_is_the_best(play: Any) -> None:
    result, *_ = play(federation={"rounds": 3}, training={"learning_rate": 1e-20})
    assert result.progress is not None and result.progress.best_round == 1


def test_the_best_round_is_the_highest_of_its_metric(play: Any) -> None:
    result, _, _, run = play(
        federation={"rounds": 6},
        evaluation={"metric_for_best_model": "accuracy"},
        training={"learning_rate": 0.05},
    )
    values = [
        line.validation.pooled["accuracy"] for line in read_jsonl(run.output_dir / METRICS_FILE, RoundMetrics)
    ]
    assert len(set(values)) > 2, "the model must have learnt something"
    assert result.progress is not None and result.progress.best_value == max(values)
    assert result.progress.best_round == 1 + values.index(max(values))


def test_one_site_and_one_round_of_fedavg_is_plain_peft_training(
    play: Any, plain_peft_loop: Any, make_sites: Any
) -> None:
    sites = make_sites(north=17)
    result, _, _, run = play(rows=sites, training={"max_steps": None, "num_train_epochs": 2})
    initial = load_model(run.config).initial
    expected = plain_peft_loop(run.config, sites["north"]["train"], initial, 1)
    found = result.state.adapter
    assert found.minus(initial).l2_norm > 0.1
    assert max(float(np.abs(found[name] - expected[name]).max()) for name in expected) < 1e-5


def test_with_ffa_no_a_moves_and_none_travels(play: Any) -> None:
    result, records, grid, run = play(federation={"rounds": 3}, aggregation={"name": "ffa"})
    initial = load_model(run.config).initial
    for name, array in result.state.adapter.items():
        same = np.array_equal(array, initial[name])
        assert same == is_lora_a(name), name
    sent = [r for r in grid.requests if r.header.phase not in ("join", "start")]
    came = [u for u in grid.updates if u.header.phase == "fit"]
    assert len(sent) == 18 and len(came) == 9
    for message in (*sent, *came):
        assert len(message.arrays) > 0
        assert not any(is_lora_a(name) for name in message.arrays)
    everything = play(out="fedavg", federation={"rounds": 3})[1]
    assert records[0].bytes_up["north"] < 0.8 * everything[0].bytes_up["north"]


def test_with_fedex_the_models_mean_is_exact_in_every_round(play: Any) -> None:
    result, _, grid, run = play(federation={"rounds": 3}, aggregation={"name": "fedex"}, save_total_limit=3)
    assert result.state.residual
    states = [load_checkpoint(run.output_dir, round)[0] for round in (1, 2, 3)]
    assert states[2].stored().content_hash == result.state.stored().content_hash
    for round in (2, 3):
        before, after = states[round - 2], states[round - 1]
        came = [u for u in grid.updates if u.header.phase == "fit" and u.header.round == round]
        total = sum(update.header.num_examples for update in came)
        missed = []
        for layer in lora_layers(after.adapter):
            wanted = product(before.residual, layer, RESIDUAL_B, RESIDUAL_A) + sum(
                update.header.num_examples / total * product(update.arrays, layer, LORA_B, LORA_A)
                for update in came
            )
            found = product(after.adapter, layer, LORA_B, LORA_A)
            old = product(before.residual, layer, RESIDUAL_B, RESIDUAL_A)
            missed.append(np.abs(found + old - wanted).max())
            found = found + product(after.residual, layer, RESIDUAL_B, RESIDUAL_A)
            np.testing.assert_allclose(found, wanted, atol=1e-6)
        assert max(missed) > 1e-4, "the residual must matter, or this test shows nothing"


def product(arrays: Adapter, layer: str, b: str, a: str) -> Any:
    return arrays[layer + b].astype(np.float64) @ arrays[layer + a].astype(np.float64)


def test_with_fedex_and_one_site_there_is_no_residual(play: Any) -> None:
    result, *_ = play(sites={"north": 12}, federation={"rounds": 3}, aggregation={"name": "fedex"})
    assert result.state.residual == {}
    plain, *_ = play(sites={"north": 12}, federation={"rounds": 3}, out="fedavg")
    assert plain.state.adapter.content_hash == result.state.adapter.content_hash
