"""What a hostile site sends neither moves the model nor is delivered; uneven honest ones are left alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import clock as clocks
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tampered import NAMES, Tampered, described, edited

from quorate.client.site.request import Request
from quorate.client.site.site import Site
from quorate.server.results.complete import complete_run
from quorate.server.rounds import screening
from quorate.server.rounds.checkpoint import list_checkpoints
from quorate.server.rounds.loop import run_rounds
from quorate.server.rounds.run import METRICS_FILE, RECORD_FILE, SUMMARY_FILE, Run, read_jsonl
from quorate.server.rounds.screening import FEWEST, WIDEST, Passed, Screen, largest_weight, room
from quorate.server.tracking.records import RoundMetrics, RoundRecord, Summary
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.config.run_config import RoundsConfig
from quorate.shared.errors import ModelDiverged
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.protocol.messages import RequestHeader, RoundRequest, Update
from quorate.simulations.runner import simulate

SIZES = {"east": 9, "north": 12, "south": 7, "west": 5}
Change = Callable[[Update], Update]


def hostile(monkeypatch: pytest.MonkeyPatch, site: str, change: Change) -> None:
    """Let one site's process answer as its owner pleases."""
    real = Site.handle_many

    def handle_many(self: Site, requests: Sequence[Request]) -> list[Update]:
        return [change(each) if each.header.site == site else each for each in real(self, requests)]

    monkeypatch.setattr(Site, "handle_many", handle_many)


def poisoned(update: Update) -> Update:
    if update.header.phase != "fit":
        return update
    return edited(update, update.arrays.map(lambda _, array: np.full_like(array, 1e30)))


def from_round(round: int, change: Change) -> Change:
    return lambda update: change(update) if update.header.round >= round else update


def records(folder: Path) -> list[Any]:
    return read_jsonl(folder / RECORD_FILE, RoundRecord)


def adapter(folder: Path) -> Adapter:
    return Adapter.from_bytes((folder / "adapter" / "adapter_model.safetensors").read_bytes())


def test_arrays_of_1e30_are_set_aside_by_default(
    make_run: Any, make_sites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_sites(**SIZES)
    run = make_run(training={"optim": "sgd", "learning_rate": 0.1})  # AdamW magnifies a gradient's last bit
    simulate(run, {name: rows[name] for name in SIZES if name != "south"}, tmp_path / "without")
    hostile(monkeypatch, "south", poisoned)
    summary = simulate(run, rows, tmp_path / "out")
    assert summary.status == "done"
    for record in records(tmp_path / "out"):
        assert record.excluded["south"].code == "norm" and "max_norm_ratio" in record.excluded["south"].reason
        assert set(record.weights) == {"east", "north", "west"}
    delivered, honest = adapter(tmp_path / "out"), adapter(tmp_path / "without")
    assert delivered.minus(honest).l2_norm < 0.01 * honest.l2_norm, "the others' model, but for the stack"


@pytest.mark.parametrize("ratio", [10.0, None])
def test_of_two_sites_the_round_before_tells_who_moves_too_far(
    make_run: Any, make_sites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratio: float | None
) -> None:
    """With the bound it is set aside; without, the run fails and the last good round is delivered."""
    hostile(monkeypatch, "south", from_round(2, poisoned))
    run = make_run(federation={"rounds": 3, "max_norm_ratio": ratio})
    rows, out = make_sites(north=12, south=7), tmp_path / "out"
    if ratio is not None:
        assert simulate(run, rows, out).status == "done"
        assert [list(record.excluded) for record in records(out)] == [[], ["south"], ["south"]]
        return
    with pytest.raises(ModelDiverged) as raised:
        simulate(run, rows, out)
    assert raised.value.exit_code == 4 and "south" in str(raised.value)
    summary = Summary.model_validate(json.loads((out / SUMMARY_FILE).read_text()))
    assert summary.status == "diverged" and summary.rounds == 1
    assert summary.best is not None and summary.best.round == 1 and summary.best.validation is not None
    assert list_checkpoints(out) == [1], "the round that spoiled it leaves none, so --resume runs it again"
    assert max(float(np.abs(array).max()) for array in adapter(out).values()) < 1e3
    assert "the adapter is that of round 1" in (out / "report.html").read_text()


def test_where_no_round_was_good_no_adapter_is_left(
    make_run: Any, make_sites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile(monkeypatch, "south", poisoned)
    rows = make_sites(north=12, south=7)
    with pytest.raises(ModelDiverged):
        simulate(make_run(), rows, tmp_path / "out")
    assert not (tmp_path / "out" / "adapter").exists()
    # Where nothing is validated, the test tells it.
    unvalidated = {name: {**splits, "validation": []} for name, splits in rows.items()}
    with pytest.raises(ModelDiverged):
        simulate(make_run(federation={"rounds": 1}), unvalidated, tmp_path / "tested")
    assert not (tmp_path / "tested" / "adapter").exists()
    page = (tmp_path / "tested" / "report.html").read_text()
    assert "no site has rows" not in page and "there is no adapter" in page


def test_more_rows_than_anybody_has_do_not_join(
    make_run: Any, make_sites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def claims(update: Update) -> Update:
        if update.header.phase != "join":
            return update
        return described(update, rows={"train": 2**53, "validation": 9, "test": 11})

    hostile(monkeypatch, "south", claims)
    summary = simulate(make_run(), make_sites(**SIZES), tmp_path / "out")
    assert set(summary.sites) == {"east", "north", "west"}
    assert [why[0].code for why in summary.excluded.values()] == ["protocol"]


def test_a_claim_of_rows_buys_half_of_the_weight_at_most(
    make_run: Any, make_sites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def claims(update: Update) -> Update:
        if update.header.phase == "join":
            return described(update, rows={"train": 10**9, "validation": 9, "test": 11})
        return edited(update, num_examples=10**9) if update.header.phase == "fit" else update

    hostile(monkeypatch, "south", claims)
    simulate(make_run(federation={"rounds": 1}), make_sites(**SIZES), tmp_path / "out")
    (record,) = records(tmp_path / "out")
    assert record.weights["south"] == pytest.approx(0.5)
    assert record.weights["north"] == pytest.approx(0.5 * 12 / 26)


@pytest.mark.parametrize(
    "loss", [-1.0, 1e90, *(pytest.param(loss, marks=pytest.mark.slow) for loss in (-1e90, 1e9))]
)
def test_a_loss_that_cannot_be_is_not_pooled(
    make_run: Any, make_sites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: float
) -> None:
    def lies(update: Update) -> Update:
        outcomes = update.header.outcomes
        return edited(update, outcomes=outcomes.model_copy(update={"loss_sum": loss})) if outcomes else update

    hostile(monkeypatch, "south", lies)
    summary = simulate(make_run(), make_sites(**SIZES), tmp_path / "out")
    assert summary.best is not None and summary.best.test is not None
    assert summary.best.test.missing["south"].code == "protocol"
    for line in read_jsonl(tmp_path / "out" / METRICS_FILE, RoundMetrics):
        assert 0 < line.validation.pooled["loss"] < 100 and "south" not in line.validation.sites


def test_a_report_says_why_nothing_was_measured(
    make_run: Any, make_sites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(update: Update) -> Update:
        return edited(update, error="data") if update.header.phase == "evaluate" else update

    hostile(monkeypatch, "south", fails)
    simulate(make_run(), make_sites(south=9), tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "no site has" not in page and "south could not use its own data" in page


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 10))]
)
def test_honest_sites_are_left_alone_however_uneven(
    make_run: Any, make_sites: Any, tmp_path: Path, seed: int
) -> None:
    """Ten times as many rows, epochs instead of steps, and labels that others do not have."""
    rows = make_sites(east=60, north=20, south=6, west=12, coast=30)
    for name, label in (("south", 0), ("west", 1), ("coast", 2)):
        rows[name]["train"] = [
            row for row in rows[name]["train"] if name == "coast" or row.values["label"] != label
        ]
    training = {"max_steps": None, "num_train_epochs": 1, "learning_rate": 1e-2}
    summary = simulate(make_run(seed=seed, training=training), rows, tmp_path / "out")
    assert summary.excluded == {}
    for record in records(tmp_path / "out"):
        total = sum(record.num_examples.values())
        shares = {site: count / total for site, count in record.num_examples.items()}
        assert record.weights == pytest.approx(shares), "nor does anybody weigh less than it has rows"


def test_a_site_of_fifty_times_the_rows_may_move_further(play: Any) -> None:
    training = {
        "max_steps": None, "num_train_epochs": 1, "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
    }  # fmt: skip
    _, rounds, _, _ = play(
        sites={"a": 16, "b": 16, "c": 800}, training=training, federation={"rounds": 1, "quorum": 1}
    )
    assert set(rounds[0].weights) == {"a", "b", "c"} and not rounds[0].excluded
    norms = rounds[0].update_norms
    assert norms["c"] > 10 * norms["a"], "or the bound itself would do"


def test_only_more_planned_steps_give_a_site_more_room(make_run: Any) -> None:
    epochs = make_run(
        training={"max_steps": None, "num_train_epochs": 2, "per_device_train_batch_size": 8}
    ).training
    assert room(epochs, {"a": 16, "b": 16, "c": 800}) == {"a": 1.0, "b": 1.0, "c": 50.0}
    assert room(epochs, {"a": 16, "b": 16, "c": 10**9})["c"] == WIDEST
    assert room(epochs, {"a": 1, "b": 16, "c": 16})["a"] == 1.0
    steps = make_run(training={"max_steps": 5}).training
    assert set(room(steps, {"a": 16, "b": 16, "c": 800}).values()) == {1.0}


@pytest.mark.parametrize("how", ["others silent", "other rows"])
def test_one_sites_bad_answer_does_not_say_that_the_model_diverged(
    make_run: Any, make_sites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    clocks.installed(monkeypatch)
    rows = make_sites(north=8, south=7, west=5)
    if how == "other rows":
        for name in ("north", "west"):
            rows[name]["validation"] = []

    def lies(update: Update) -> Update | None:
        header = update.header
        if header.phase != "evaluate" or header.round != 2 or header.outcomes is None:
            return update
        if how == "others silent":
            outcomes = header.outcomes.model_copy(update={"loss_sum": -1e90})
            return edited(update, outcomes=outcomes) if header.site == "south" else None
        counts = header.outcomes.counts
        outcomes = header.outcomes.model_copy(update={"counts": (counts[0] + 1, *counts[1:])})
        return edited(update, num_examples=header.num_examples + 1, outcomes=outcomes)

    site = Site(rows)
    federation = {"rounds": 2, "quorum": 1, "grace_seconds": 0.5, "timeout_seconds": 5, "reask_seconds": 0}
    run = Run.open(site.prepare(make_run(federation=federation)), tmp_path / "out")
    result = run_rounds(Tampered(site, lies), run, NAMES)
    assert result.status == "done" and result.progress is not None
    missing = result.progress.metrics.validation.missing
    assert missing["south"].code == ("protocol" if how == "others silent" else "rows")


@pytest.mark.parametrize("diverges", [2, 4])
def test_a_model_that_diverged_between_evaluations_falls_back_to_the_last_measured_one(
    make_run: Any, make_sites: Any, tmp_path: Path, diverges: int
) -> None:
    """And a summary that hides who took part gives no totals that tell it."""

    def fails(update: Update) -> Update:
        measured = update.header.phase == "evaluate" and update.header.round == diverges
        return edited(update, error="non-finite") if measured else update

    site, out = Site(make_sites(**SIZES)), tmp_path / "out"
    privacy = {"unit": "client", "noise_multiplier": 0.5, "clipping_norm": 0.1, "delta": 1e-3}
    config = make_run(
        federation={"rounds": 4},
        evaluation={"every": 2},
        aggregation={"name": "fedavg", "weighting": "uniform"},
        privacy={**privacy, "participation_hidden": True},
    )
    run = Run.open(site.prepare(config), out)
    grid = Tampered(site, fails)
    result = run_rounds(grid, run)
    with pytest.raises(ModelDiverged):
        complete_run(grid, run, result)
    summary = Summary.model_validate(json.loads((out / SUMMARY_FILE).read_text()))
    assert summary.status == "diverged" and not summary.bytes and not summary.seconds
    page = (out / "report.html").read_text()
    if diverges == 2:
        assert summary.best is None and not (out / "adapter").exists()
        assert "there is no adapter" in page
    else:
        assert summary.best is not None and summary.best.round == 2
        assert (out / "adapter").exists() and "the adapter is that of round 2" in page


# --- The screen itself


def update_of(site: str) -> Update:
    request = RoundRequest(
        RequestHeader(run_id="r", round=1, phase="fit", site=site, run_config="{}", config_hash="0" * 64)
    )
    return Update.reply(request, Adapter({}), num_examples=1)


NORMS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=2), st.floats(0, 1e3) | st.just(1e30), min_size=1, max_size=9
)


@given(NORMS, st.lists(st.integers(1, 10**6), min_size=9, max_size=9), st.randoms(use_true_random=False))
def test_what_counts_does_not_depend_on_when_it_came(
    norms: dict[str, float], rows: list[int], draw: Any
) -> None:
    """Passed on early, as soon as that is safe, or after all have come: the same sites, weights and order."""
    federation = RoundsConfig(rounds=1)
    order = sorted(norms)
    weights = dict(zip(order, map(float, rows), strict=False))

    def played(known_before: list[str]) -> tuple[list[tuple[str, float]], set[str]]:
        screen = Screen(federation, len(order), 1.0, [])
        updates = {
            site: Passed(site, update_of(site).header, Adapter({}), weights[site], norms[site])
            for site in order
        }
        for site in known_before:
            screen.see(updates[site])
        passed = [(each.site, each.weight) for each in screen.passed(updates.values())]
        return passed, set(screen.excluded)

    early = [site for site in order if draw.random() < 0.5]
    assert played([]) == played(order) == played(early)
    passed, excluded = played([])
    assert {site for site, _ in passed} | excluded == set(order)
    if len(order) >= FEWEST:
        bound = 10 * max(float(np.median(list(norms.values()))), screening.STILL)
        assert excluded == {site for site in order if norms[site] > bound}
    total = sum(weight for _, weight in passed)
    if len(passed) >= FEWEST:
        assert max(weight for _, weight in passed) <= 0.5 * total * (1 + 1e-9)


@given(st.lists(st.floats(1, 1e9), min_size=2, max_size=12), st.sampled_from([0.1, 0.2, 0.4, 0.5, 0.8, 1.0]))
def test_no_share_is_above_the_largest(weights: list[float], share: float) -> None:
    cap = largest_weight(weights, share)
    capped = weights if cap is None else [min(weight, cap) for weight in weights]
    most = max(share if len(weights) >= FEWEST else max(share, 0.9), 1 / len(weights))
    assert max(capped) <= most * sum(capped) * (1 + 1e-9)
    if cap is not None and min(weights) < cap:  # and no more is taken away than that asks for
        assert max(capped) == pytest.approx(most * sum(capped))


def test_updates_are_passed_on_before_the_last_has_come() -> None:
    """Most of a cohort need not be held: a rule that streams keeps its memory."""
    order = [f"{number:02d}" for number in range(20)]
    come: list[str] = []

    def arriving() -> Any:
        for site in order:
            come.append(site)
            yield Passed(site, update_of(site).header, Adapter({}), 1.0, 1.0)

    passed = Screen(RoundsConfig(rounds=1), 20, 1.0, []).passed(arriving())
    next(passed)
    assert len(come) == 10


def test_sums_that_no_errors_have_are_refused(make_run: Any) -> None:
    from quorate.shared.config.run_config import RunConfig
    from quorate.shared.errors import ProtocolError

    run = make_run().model_dump() | {"task": {"name": "sequence_regression", "max_length": 24}}
    task = RunConfig.model_validate(run).task
    good = {"absolute": 4.0, "squared": 10.0, "target": -6.0, "target_squared": 20.0}
    task.check_outcomes(Outcomes(num_rows=2, sums=good))
    for bad in ({"absolute": -1.0}, {"squared": -1.0}, {"squared": 1.0}, {"target_squared": 2.0}):
        with pytest.raises(ProtocolError):
            task.check_outcomes(Outcomes(num_rows=2, sums={**good, **bad}))
