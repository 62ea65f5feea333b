"""Limits of a site: rounds and steps before a row is read, minutes at a step, runs and minutes by the day."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from site_folder import request
from whole_site import WholeSite

from quorate.client.policy import limits
from quorate.client.policy.site_config import PolicyConfig
from quorate.client.process import reload
from quorate.client.runs.run_history import DATABASE
from quorate.server.exchange.exclusions import REASONS
from quorate.shared.config.load import load_run
from quorate.shared.config.run_config import RunConfig

RECIPES = sorted(
    path
    for path in (Path(__file__).resolve().parents[4] / "simulations" / "recipes").rglob("*.yaml")
    if not path.name.endswith(".sites.yaml")
)


class Clock:
    """`time.monotonic` of the limits, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return time.time()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(limits, "time", clock)
    monkeypatch.setattr(reload, "SETTLE_SECONDS", 0.0)
    return clock


@pytest.fixture
def site(make_site: Any, clock: Clock) -> Any:
    return make_site


def passing(site: WholeSite, clock: Clock, seconds: float) -> None:
    """Let every optimiser step take so long."""

    def step() -> None:
        clock.now += seconds

    site.on_step = step


def test_a_run_of_ten_thousand_rounds_is_refused_by_default(site: Any, pinned: Any) -> None:
    whole = site()
    update = whole.ask(request(pinned(federation={"rounds": 10_000}), "join", 0))
    assert update.header.error == "policy-rounds" and "policy-rounds" in REASONS
    whole.configure(max_rounds=None)
    assert whole.ask(request(pinned(federation={"rounds": 10_000}), "join", 0)).header.error is None


@pytest.mark.parametrize(
    ("training", "most", "allowed"),
    [
        ({"max_steps": 7}, 7, True),
        ({"max_steps": 8}, 7, False),
        # 58 rows in batches of 4: 15 steps an epoch.
        ({"max_steps": None, "num_train_epochs": 2}, 30, True),
        ({"max_steps": None, "num_train_epochs": 2}, 29, False),
        # Passes are counted: one optimiser step could be any number of them.
        ({"max_steps": 4, "gradient_accumulation_steps": 3}, 12, True),
        ({"max_steps": 4, "gradient_accumulation_steps": 3}, 11, False),
        ({"max_steps": None, "gradient_accumulation_steps": 2}, 15, True),
        ({"max_steps": None, "gradient_accumulation_steps": 2}, 14, False),
        ({"max_steps": None, "examples_per_class": 4}, 3, True),
        ({"max_steps": None, "examples_per_class": 4}, 2, False),
    ],
)
def test_steps_of_a_round(site: Any, pinned: Any, training: Any, most: int, allowed: bool) -> None:
    whole = site(max_steps_per_round=most)
    for phase, round in (("join", 0), ("fit", 1)):
        update = whole.ask(request(pinned(training=training), phase, round))
        assert update.header.error == (None if allowed else "policy-steps")
    assert whole.passes == (most if allowed else 0), "refused before the first step, and not a step too early"
    assert "policy-steps" in REASONS


def test_steps_that_are_asked_for_are_refused_before_data_are_read(site: Any, pinned: Any) -> None:
    whole = site(max_steps_per_round=2)
    (whole.folder.path / "notes.csv").unlink()
    assert whole.ask(request(pinned(), "join", 0)).header.error == "policy-steps"


def test_a_round_ends_at_the_step_that_takes_too_long(site: Any, pinned: Any, clock: Clock) -> None:
    whole = site(max_minutes_per_round=2)
    passing(whole, clock, 59)
    run = pinned(training={"max_steps": 3})
    assert whole.ask(request(run)).header.error is None
    longer = pinned(training={"max_steps": 30})
    update = whole.ask(request(longer, run_id="f" * 16))
    assert (update.header.error, len(update.arrays), update.header.num_examples) == ("policy-minutes", 0, 0)
    assert whole.steps == 3 + 4, "three steps of 59 s are over two minutes"
    assert "policy-minutes" in REASONS
    clock.now += 10_000
    assert whole.ask(request(run, round=2)).header.error is None, "the next round has minutes of its own"


def test_a_step_of_many_passes_ends_at_the_pass_that_takes_too_long(
    site: Any, pinned: Any, clock: Clock
) -> None:
    whole = site(max_minutes_per_round=2)
    passing(whole, clock, 59)
    run = pinned(training={"max_steps": 1, "gradient_accumulation_steps": 50})
    assert whole.ask(request(run)).header.error == "policy-minutes"
    assert (whole.passes, whole.steps) == (4, 0)


def test_rows_of_a_round(site: Any, pinned: Any) -> None:
    run = pinned(training={"max_steps": 3, "per_device_train_batch_size": 2000})
    assert site().ask(request(run)).header.error is None
    assert site(max_rows_per_round=5999).ask(request(run)).header.error == "policy-steps"
    most = pinned(training={"max_steps": 2_600, "per_device_train_batch_size": 4096})
    assert site().ask(request(most, "join", 0)).header.error == "policy-steps", "by default"
    groups = pinned(privacy={"unit": "group", "noise_multiplier": 1.0, "max_records_per_group": 1000})
    assert site(max_rows_per_round=50).ask(request(groups, "join", 0)).header.error == "policy-steps"


def test_training_alone_has_minutes_for_each_of_its_rounds(site: Any, pinned: Any, clock: Clock) -> None:
    run = pinned(evaluation={"references": ["local_only"]}, federation={"rounds": 3})
    whole = site(max_minutes_per_round=2)
    passing(whole, clock, 35)
    assert whole.ask(request(run, "alone", 0)).header.error is None, "315 s over three rounds"
    passing(whole, clock, 70)
    assert whole.ask(request(run, "alone", 0, run_id="f" * 16)).header.error == "policy-minutes"


def test_a_private_round_that_is_cut_short_is_paid_for_once(site: Any, pinned: Any, clock: Clock) -> None:
    run = pinned(privacy={"unit": "record", "noise_multiplier": 1.0}, training={"max_steps": 5})
    whole = site(max_minutes_per_round=2)
    passing(whole, clock, 59)
    for _ in range(2):
        assert whole.ask(request(run)).header.error == "policy-minutes"
        assert len(whole.chain.accounted.open().reservations) == 1
    passing(whole, clock, 0)
    assert whole.ask(request(run)).header.error is None
    assert len(whole.chain.accounted.open().reservations) == 1


def test_minutes_by_the_day(site: Any, pinned: Any, clock: Clock) -> None:
    whole = site(max_minutes_per_day=10)
    assert whole.ask(request(pinned())).header.error is None
    with sqlite3.connect(whole.folder.state / DATABASE) as db:
        db.execute("UPDATE work SET seconds = 599")
    passing(whole, clock, 2)
    assert whole.ask(request(pinned(), round=2)).header.error == "policy-minutes", "while it trains"
    with sqlite3.connect(whole.folder.state / DATABASE) as db:
        db.execute("UPDATE work SET seconds = 601")
    for phase, round, split in (("join", 0, None), ("fit", 2, None), ("evaluate", 2, "test")):
        update = whole.ask(request(pinned(), phase, round, split=split))
        assert update.header.error == "policy-minutes"
    with sqlite3.connect(whole.folder.state / DATABASE) as db:
        db.execute("UPDATE work SET hour = hour - 25")
    passing(whole, clock, 0)
    assert whole.ask(request(pinned(), round=2)).header.error is None, "yesterday's work does not count"


def test_runs_by_the_day(site: Any, pinned: Any) -> None:
    whole = site(max_runs_per_day=2, max_rank=8)
    for number in range(5):  # what is refused has not begun
        asked = request(pinned(adapter={"r": 9}), "join", 0, run_id=f"{number + 100:016x}")
        assert whole.ask(asked).header.error == "policy-rank"
    for number, error in enumerate((None, None, "policy-runs")):
        asked = request(pinned(), "join", 0, run_id=f"{number:016x}")
        assert whole.ask(asked).header.error == error
    assert "policy-runs" in REASONS
    whole.restart()
    assert whole.ask(request(pinned(), run_id=f"{3:016x}")).header.error == "policy-runs", "by any message"
    assert whole.ask(request(pinned(), run_id=f"{1:016x}")).header.error is None, "what began goes on"
    with sqlite3.connect(whole.folder.state / DATABASE) as db:
        db.execute("UPDATE runs SET begun_at = begun_at - 86401")
    assert whole.ask(request(pinned(), run_id=f"{3:016x}")).header.error is None


@pytest.mark.parametrize("phase", ["fit", "evaluate", "alone"])
def test_a_run_that_does_not_join_gets_the_rows_as_they_are(site: Any, pinned: Any, phase: str) -> None:
    whole = site()
    assert whole.ask(request(pinned(), "join", 0)).header.error is None
    assert whole.ask(request(pinned())).header.num_examples == 58
    (whole.folder.path / "notes.csv").write_text("text,label\n")  # every row is withdrawn
    going_on = whole.ask(request(pinned(), round=2))
    assert going_on.header.num_examples == 58, "the same rows for as long as a run goes on"
    round, split = (0 if phase == "alone" else 1), ("test" if phase == "evaluate" else None)
    update = whole.ask(request(pinned(), phase, round, split=split, run_id="f" * 16))
    assert update.header.error == "data"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.stem))
def test_the_defaults_admit_every_recipe(path: Path) -> None:
    run, policy = load_run(path), PolicyConfig()
    assert isinstance(run, RunConfig)
    assert policy.max_rounds is not None and policy.max_steps_per_round is not None
    assert 10 * run.federation.rounds <= policy.max_rounds
    assert 10 * (run.training.max_steps or 0) <= policy.max_steps_per_round
