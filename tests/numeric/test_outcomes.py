"""Counts of outcomes: they add up over sites, and resampling them is resampling rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from quorate.server.evaluation import interval, summarise, worth
from quorate.shared.outcomes import Outcomes
from quorate.shared.tasks import SequenceClassification

TASK = SequenceClassification(name="sequence_classification", labels=("no", "yes", "maybe"))
rows_of = arrays.arrays(np.int64, st.tuples(st.integers(0, 30), st.just(2)), elements=st.integers(0, 2))


def hits(correct: int, rows: int, loss: float = 0.0) -> Outcomes:
    """A test in which `correct` of `rows` are right."""
    pairs = [[1, 1]] * correct + [[1, 0]] * (rows - correct)
    return Outcomes.of_rows(np.array(pairs, dtype=np.int64).reshape(-1, 2), loss)


@given(st.lists(rows_of, min_size=1, max_size=4))
def test_pooling_is_counting_together(parts: list[Any]) -> None:
    pooled = Outcomes.pooled(Outcomes.of_rows(part, 0.5) for part in parts)
    together = Outcomes.of_rows(np.concatenate(parts), 0.5 * len(parts))
    assert pooled == together
    assert pooled.rows == sum(map(len, parts))
    assert pooled == Outcomes.pooled(Outcomes.of_rows(part, 0.5) for part in reversed(parts))


@given(rows_of.filter(len), st.integers(0, 2**32))
def test_a_resample_draws_as_many_rows_from_those_there_are(rows: Any, seed: int) -> None:
    outcomes = Outcomes.of_rows(rows, 1.0)
    drawn = outcomes.resampled(np.random.default_rng(seed))
    assert drawn.rows == outcomes.rows and drawn.values == outcomes.values
    assert all(count >= 0 for count in drawn.counts)
    assert Outcomes.model_validate(drawn.model_dump()) == drawn, "what was not validated is valid"


def test_an_inconsistent_count_is_refused() -> None:
    for fields in (
        {"values": ((0, 1),), "counts": ()},
        {"values": ((0, 1),), "counts": (-1,)},
        {"values": ((0, 1), (0,)), "counts": (1, 1)},
        {"values": (), "counts": (), "loss_sum": float("nan")},
    ):
        with pytest.raises(ValueError, match=r"outcomes|finite"):
            Outcomes.model_validate(fields)


@pytest.mark.parametrize(("correct", "rows"), [(80, 100), (30, 200), (250, 500)])
def test_the_interval_of_an_accuracy_is_the_binomial_one(correct: int, rows: int) -> None:
    """A bootstrap of a proportion draws binomially, so its percentiles are known."""
    low, high = interval(TASK, hits(correct, rows), 4000, seed=1, name="x")["accuracy"]
    exact = stats.binom(rows, correct / rows).ppf([0.025, 0.975]) / rows
    assert [low, high] == pytest.approx(exact.tolist(), abs=1.5 / rows + 0.002)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    truth, rows, repeats = 0.7, 120, 120
    draw = np.random.default_rng(0)
    covered = 0
    for repeat in range(repeats):
        sample = hits(int(draw.binomial(rows, truth)), rows)
        low, high = interval(TASK, sample, 200, seed=repeat, name="x")["accuracy"]
        covered += low <= truth <= high
    assert 0.88 <= covered / repeats <= 1.0  # 95 % less 3.5 standard errors; all covered would be luck
    assert covered < repeats, "intervals that always cover are too wide"


def test_intervals_depend_on_the_seed_and_the_name_alone() -> None:
    outcomes = hits(40, 60)
    first = interval(TASK, outcomes, 50, seed=1, name="north")
    assert interval(TASK, outcomes, 50, seed=1, name="north") == first
    assert interval(TASK, outcomes, 50, seed=2, name="north") != first
    assert "loss" not in first, "only a sum of the loss is known"


def test_a_summary_pools_rows_and_averages_sites() -> None:
    sites = {"north": hits(9, 10, loss=5.0), "south": hits(10, 40, loss=100.0), "none": Outcomes()}
    found = summarise(TASK, "test", sites, samples=30, seed=1)
    assert found.pooled["accuracy"] == pytest.approx(19 / 50)
    assert found.pooled["loss"] == pytest.approx(105 / 50)
    assert found.mean["accuracy"] == pytest.approx((0.9 + 0.25) / 2)
    assert found.rows == {"north": 10, "south": 40}, "a site without rows has no figures"
    assert set(found.intervals["sites"]) == {"north", "south"}
    for site in found.rows:
        low, high = found.intervals["sites"][site]["accuracy"]
        assert low <= found.sites[site]["accuracy"] <= high
    empty = summarise(TASK, "test", {"none": Outcomes()}, samples=30)
    assert (empty.pooled, empty.mean, empty.rows, empty.intervals) == ({}, {}, {}, {})


def test_worth_is_federated_less_local() -> None:
    gain = worth(TASK, "accuracy", hits(90, 100), hits(60, 100), samples=400, seed=1, site="north")
    assert gain.gain == pytest.approx(0.3) and gain.federated == 0.9 and gain.local_only == 0.6
    assert gain.interval is not None and 0 < gain.interval[0] < 0.3 < gain.interval[1] < 0.5
    loss = worth(TASK, "accuracy", hits(60, 100), hits(90, 100), samples=400, seed=1, site="north")
    assert loss.gain == pytest.approx(-0.3) and loss.interval is not None and loss.interval[1] < 0
    even = worth(TASK, "accuracy", hits(70, 100), hits(70, 100), samples=400, seed=1, site="north")
    assert even.gain == 0 and even.interval is not None and even.interval[0] < 0 < even.interval[1]
    bare = worth(TASK, "accuracy", hits(1, 2), hits(1, 2), samples=0, seed=1, site="north")
    assert bare.interval is None
