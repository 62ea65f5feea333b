"""Counts of outcomes: they add up over sites, and figures with their intervals follow from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pydantic import ValidationError

from quorate.server.rounds.evaluation import local_gain, summarise
from quorate.shared.metrics.outcomes import Outcomes
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


def test_an_inconsistent_count_is_refused() -> None:
    of_all: tuple[str, ...] = ()
    for fields, place, wrong in (
        ({"values": ((0, 1),), "counts": ()}, of_all, "value_error"),
        ({"values": ((0, 1),), "counts": (-1,)}, of_all, "value_error"),
        ({"values": ((0, 1), (0,)), "counts": (1, 1)}, of_all, "value_error"),
        ({"values": (), "counts": (), "loss_sum": float("nan")}, ("loss_sum",), "finite_number"),
    ):
        with pytest.raises(ValidationError) as caught:
            Outcomes.model_validate(fields)
        (error,) = caught.value.errors()
        assert (error["loc"], error["type"]) == (place, wrong)


def test_a_summary_pools_rows_and_averages_sites() -> None:
    sites = {"north": hits(9, 10, loss=5.0), "south": hits(10, 40, loss=100.0), "none": Outcomes()}
    found = summarise(TASK, "test", sites, intervals=True)
    assert found.pooled["accuracy"] == pytest.approx(19 / 50)
    assert found.pooled["loss"] == pytest.approx(105 / 50)
    assert found.mean["accuracy"] == pytest.approx((0.9 + 0.25) / 2)
    assert found.rows == {"north": 10, "south": 40}, "a site without rows has no figures"
    assert set(found.intervals["sites"]) == {"north", "south"}
    assert set(found.intervals["pooled"]) <= {"accuracy", "macro_f1"}, "only a sum of the loss is known"
    for site in found.rows:
        low, high = found.intervals["sites"][site]["accuracy"]
        assert low <= found.sites[site]["accuracy"] <= high
    empty = summarise(TASK, "test", {"none": Outcomes()}, intervals=True)
    assert (empty.pooled, empty.mean, empty.rows, empty.intervals) == ({}, {}, {}, {})


def test_worth_is_federated_less_local() -> None:
    gain = local_gain(TASK, "accuracy", hits(90, 100), hits(60, 100), intervals=True)
    assert gain.gain == pytest.approx(0.3) and gain.federated == 0.9 and gain.local_only == 0.6
    assert gain.interval is not None and 0 < gain.interval[0] < 0.3 < gain.interval[1] < 0.5
    loss = local_gain(TASK, "accuracy", hits(60, 100), hits(90, 100), intervals=True)
    assert loss.gain == pytest.approx(-0.3) and loss.interval is not None and loss.interval[1] < 0
    even = local_gain(TASK, "accuracy", hits(70, 100), hits(70, 100), intervals=True)
    assert even.gain == 0 and even.interval is not None and even.interval[0] < 0 < even.interval[1]
    bare = local_gain(TASK, "accuracy", hits(1, 2), hits(1, 2), intervals=False)
    assert bare.interval is None
