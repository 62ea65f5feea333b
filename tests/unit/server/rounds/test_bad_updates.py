"""Updates that must not touch the model: set aside, named and recorded."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from flwr.app import Error
from refusals import refuses
from tampered import SIZES, edited, only, spoiled

from quorate.server.rounds.update_checks import check_trained
from quorate.shared.adapters.adapter import Adapter, is_lora_a
from quorate.shared.aggregation import FedAvg
from quorate.shared.errors import NonFiniteUpdate, QuorumNotMet
from quorate.shared.protocol.messages import RequestHeader, RoundRequest, Update


def infinite(update: Update) -> Update:
    name = next(iter(update.arrays))
    array = update.arrays[name].copy()
    array.flat[-1] = np.inf
    return edited(update, update.arrays.updated({name: array}))


def transposed(update: Update) -> Update:
    name = next(name for name in update.arrays if is_lora_a(name))
    return edited(update, update.arrays.updated({name: update.arrays[name].T.copy()}))


def without_one(update: Update) -> Update:
    return edited(update, update.arrays.subset(list(update.arrays)[1:]))


def with_one_more(update: Update) -> Update:
    return edited(update, update.arrays.updated({"mine.lora_A.weight": np.ones((1, 1), np.float32)}))


BAD = {
    "nan": (spoiled, "non-finite", "array .* holds NaN or infinity"),
    "one-infinity": (infinite, "non-finite", "array .* holds NaN or infinity"),
    "wrong-shape": (transposed, "adapter", r"has shape \[32, 4\]; expected \[4, 32\]"),
    "missing-array": (without_one, "adapter", "is missing"),
    "stray-array": (with_one_more, "adapter", "not part of this run's adapter"),
    "no-arrays": (lambda u: edited(u, Adapter({})), "adapter", "is missing"),
    "truncated": (lambda u: u.encoded[:-9], "protocol", "not an answer"),
    "rubbish": (lambda u: b"oops", "protocol", "not an answer"),
    "config": (lambda u: edited(u, config_hash="0" * 64), "config", "another run configuration"),
    "round": (lambda u: edited(u, round=7), "protocol", "answered round 7; asked was 1"),
    "run": (lambda u: edited(u, run_id="old"), "protocol", "answered run_id 'old'"),
    "phase": (lambda u: edited(u, phase="evaluate"), "protocol", "answered phase"),
    "site": (lambda u: edited(u, site="north"), "protocol", "answered for site 'north'; asked was 'south'"),
    "start": (lambda u: edited(u, input_hash="0" * 64), "protocol", "other arrays than it was sent"),
    "no-rows": (lambda u: edited(u, num_examples=0), "protocol", "trained on no rows"),
    "all-the-weight": (
        lambda u: edited(u, num_examples=2**53),
        "rows",
        "answered for 9007199254740992 rows; the site joined with 7",
    ),
    "figure": (lambda u: edited(u, metrics={"train_loss": 1.7e308}), "non-finite", "a training figure"),
    "figure-name": (lambda u: edited(u, metrics={"\x1b[2J": 1.0}), "protocol", "not an answer"),
    "too-many-rows": (lambda u: edited(u, num_examples=10**400), "protocol", "not an answer"),
    "data": (lambda u: edited(u, Adapter({}), error="data"), "data", "could not use its own data"),
    "internal": (lambda u: edited(u, Adapter({}), error="internal"), "internal", "its log says why"),
    "client-app": (lambda u: Error(1001, "refused"), "refused", "which rule"),
    "flower": (lambda u: Error(3, "KeyError: 'a row'"), "unreachable", "Flower"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_update_is_set_aside_named_and_recorded(play: Any, kind: str) -> None:
    change, code, reason = BAD[kind]
    result, records, _, _ = play(only("south", change))
    assert result.status == "done" and len(records) == 1
    (record,) = records
    assert list(record.excluded) == ["south"] and record.excluded["south"].code == code
    assert re.search(reason, record.excluded["south"].reason), record.excluded["south"].reason
    assert "a row" not in record.excluded["south"].reason
    assert record.weights == pytest.approx({"north": 12 / 17, "west": 5 / 17})
    assert record.num_examples == {"north": 12, "west": 5}
    assert set(record.update_norms) == set(record.num_steps) == {"north", "west"}
    assert record.cohort == ("north", "south", "west")


def test_an_array_name_from_a_site_cannot_steer_a_terminal(play: Any) -> None:
    name = "\x1b[2J\n" + "x" * 10_000
    _, (record,), _, _ = play(
        only("south", lambda u: edited(u, u.arrays.updated({name: np.ones(1, np.float32)})))
    )
    reason = record.excluded["south"].reason
    assert "not part of this run's adapter" in reason and reason.isprintable() and len(reason) < 300


def test_a_move_beyond_float32_is_set_aside() -> None:
    """A round with an infinite norm in its record could not be read back."""
    start, end = (Adapter({"a": np.full(2, value, np.float32)}) for value in (-3e38, 3e38))
    request = RoundRequest(
        RequestHeader(run_id="r", round=1, phase="fit", site="s", run_config="{}", config_hash="0" * 64)
    )
    with refuses(NonFiniteUpdate, "too-far"):
        check_trained(Update.reply(request, end, num_examples=5), end.schema, start, 5, None, FedAvg())


def test_what_is_set_aside_leaves_no_trace_in_the_model(play: Any) -> None:
    sgd = {"training": {"optim": "sgd", "learning_rate": 0.1}}  # AdamW magnifies the last bit of a gradient
    spoilt, *_ = play(only("south", spoiled), out="spoilt", **sgd)
    whole, _, grid, _ = play(out="whole", **sgd)
    assert spoilt.state.adapter.minus(whole.state.adapter).l2_norm > 1e-3, "south would have mattered"
    kept = [u for u in grid.updates if u.header.phase == "fit" and u.header.site != "south"]
    counts = [update.header.num_examples for update in kept]
    for name, array in spoilt.state.adapter.items():
        mean = sum(n * u.arrays[name].astype(np.float64) for n, u in zip(counts, kept, strict=True))
        np.testing.assert_allclose(array, mean / sum(counts), atol=1e-6)


def test_a_site_that_diverges_fails_alone(play: Any, make_sites: Any) -> None:
    """Only south has the label whose weight overflows; it trains in one stack with the others."""
    rows = make_sites(**SIZES)
    for name in ("north", "west"):
        rows[name]["train"] = [row for row in rows[name]["train"] if row.values["label"] != 2]
    assert any(row.values["label"] == 2 for row in rows["south"]["train"])
    result, (record,), _, _ = play(rows=rows, task={"class_weights": (1.0, 1.0, 3e38)})
    assert {site: why.code for site, why in record.excluded.items()} == {"south": "non-finite"}
    assert set(record.weights) == {"north", "west"}
    result.state.adapter.check_finite()


def test_a_norm_bound_sets_aside_what_moved_too_far(play: Any) -> None:
    def shove(update: Update) -> Update:
        return edited(update, update.arrays.map(lambda _, array: array + np.float32(3)))

    _, (record,), _, _ = play(only("west", shove), federation={"max_update_norm": 20.0})
    assert record.excluded["west"].code == "norm"
    assert "max_update_norm allows 20" in record.excluded["west"].reason
    assert all(0 < norm <= 20 for norm in record.update_norms.values()) and len(record.update_norms) == 2
    result, records, _, _ = play(out="tight", federation={"max_update_norm": 1e-6})
    assert isinstance(result.stopped, QuorumNotMet) and records == []
