"""What every aggregation rule promises. A rule joins by being listed in RULES."""

import gc
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from pydantic import TypeAdapter
from refusals import refuses

from quorate.shared.adapters.adapter import LORA_A, LORA_B, Adapter, lora_layers
from quorate.shared.aggregation import RULES, AggregationRule, Aggregator, GlobalState, Reptile
from quorate.shared.aggregation.rule import OPTIMIZER, RESIDUAL_A, RESIDUAL_B, Accumulator
from quorate.shared.errors import AdapterError

LAYER = "base_model.model.encoder.{}.query"
HEAD = "base_model.model.classifier.weight"
SHAPES = {
    **{LAYER.format(i) + LORA_A: (3, 11 + i) for i in range(2)},
    **{LAYER.format(i) + LORA_B: (9, 3) for i in range(2)},
    HEAD: (4, 9),
}
WEIGHTS = (30.0, 50.0, 7.0)

pytestmark = [
    pytest.mark.parametrize(
        "rule",
        [*(rule() for rule in RULES), Reptile(outer_learning_rate=0.3, decay_rounds=4)],
        ids=lambda rule: rule.name + ("-decayed" if getattr(rule, "decay_rounds", None) else ""),
    ),
    pytest.mark.parametrize("round", [1, 2], ids=lambda round: f"round-{round}"),
]


def start(shapes: dict[str, tuple[int, ...]] = SHAPES, scale: float = 1.0) -> GlobalState:
    """A federation in mid-run: every factor away from zero."""
    rng = np.random.default_rng(0)
    return GlobalState(
        Adapter({name: scale * rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()})
    )


def trained(rule: Aggregator, state: GlobalState, round: int, seed: int) -> Adapter:
    """What a site holds after training: the arrays it may train have moved, the others have not."""
    rng = np.random.default_rng([1, seed])
    names = rule.trainable(state.adapter, round)
    return state.adapter.map(
        lambda name, a: a + rng.normal(size=a.shape).astype(np.float32) if name in names else a
    )


def upload(rule: Aggregator, state: GlobalState, round: int, seed: int) -> Adapter:
    return rule.upload(trained(rule, state, round, seed), state, round)


def one_sites(rule: Aggregator, state: GlobalState, round: int, update: Adapter) -> GlobalState:
    """What a rule makes of one site's update: the update itself; for Reptile, a part of the way to it."""
    if not isinstance(rule, Reptile):
        return GlobalState(state.adapter.updated(update))
    rate = rule.rate(round)
    moved = {name: (1 - rate) * state.adapter[name] + rate * update[name] for name in update}
    return GlobalState(state.adapter.updated({name: a.astype(np.float32) for name, a in moved.items()}))


def uploads(rule: Aggregator, state: GlobalState, round: int) -> list[Adapter]:
    return [upload(rule, state, round, seed) for seed in range(len(WEIGHTS))]


def aggregate(
    rule: Aggregator, state: GlobalState, round: int, updates: list[Adapter], weights: tuple[float, ...]
) -> GlobalState:
    return accumulated(rule, state, round, updates, weights).finish()[0]


def accumulated(
    rule: Aggregator, state: GlobalState, round: int, updates: list[Adapter], weights: tuple[float, ...]
) -> Accumulator:
    accumulator = rule.init(state, round)
    for number, (update, weight) in enumerate(zip(updates, weights, strict=True)):
        accumulator.add(f"site {number}", update, weight)
    return accumulator


def model(state: GlobalState) -> dict[str, np.ndarray]:
    """What a state makes of the base, in float64: each layer's product with its residual, and the head."""
    arrays = {name: array.astype(np.float64) for name, array in state.stored().items()}
    effect = {HEAD: arrays[HEAD]}
    for layer in lora_layers(state.adapter):
        effect[layer] = arrays[layer + LORA_B] @ arrays[layer + LORA_A]
        if layer + RESIDUAL_B in arrays:
            effect[layer] = effect[layer] + arrays[layer + RESIDUAL_B] @ arrays[layer + RESIDUAL_A]
    return effect


def assert_same_model(one: GlobalState, other: GlobalState) -> None:
    """Equal up to float32 rounding of the factors."""
    mine, theirs = model(one), model(other)
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        np.testing.assert_allclose(array, theirs[name], rtol=0, atol=1e-5, err_msg=name)


def test_updates_differ_enough_for_the_tests_below_to_mean_something(rule: Aggregator, round: int) -> None:
    state = start()
    result = model(aggregate(rule, state, round, uploads(rule, state, round), WEIGHTS))
    for seed in range(len(WEIGHTS)):
        other = model(GlobalState(state.adapter.updated(upload(rule, state, round, seed))))
        assert max(np.abs(result[name] - other[name]).max() for name in result) > 0.1


def test_one_site_gives_that_sites_update(rule: Aggregator, round: int) -> None:
    state = start()
    update = upload(rule, state, round, 0)
    result = aggregate(rule, state, round, [update], (17.0,))
    assert_same_model(result, one_sites(rule, state, round, update))


def test_equal_sites_give_any_one_of_them(rule: Aggregator, round: int) -> None:
    state = start()
    update = upload(rule, state, round, 0)
    result = aggregate(rule, state, round, [update] * 3, WEIGHTS)
    assert_same_model(result, one_sites(rule, state, round, update))


def test_the_order_of_sites_does_not_matter(rule: Aggregator, round: int) -> None:
    state = start()
    updates = uploads(rule, state, round)
    forth = aggregate(rule, state, round, updates, WEIGHTS)
    back = aggregate(rule, state, round, updates[::-1], WEIGHTS[::-1])
    assert_same_model(forth, back)


def test_a_site_in_two_halves_counts_as_one(rule: Aggregator, round: int) -> None:
    state = start()
    updates = uploads(rule, state, round)
    first, *others = WEIGHTS
    whole = aggregate(rule, state, round, updates, WEIGHTS)
    halves = aggregate(rule, state, round, [updates[0], *updates], (first / 2, first / 2, *others))
    assert_same_model(whole, halves)


def test_only_the_ratio_of_weights_matters(rule: Aggregator, round: int) -> None:
    state = start()
    updates = uploads(rule, state, round)
    shares = tuple(weight / sum(WEIGHTS) for weight in WEIGHTS)
    assert_same_model(
        aggregate(rule, state, round, updates, WEIGHTS), aggregate(rule, state, round, updates, shares)
    )


def test_examples_and_uniform_weighting(rule: Aggregator, round: int) -> None:
    assert rule.weight(250) == 250
    assert rule.model_copy(update={"weighting": "uniform"}).weight(250) == 1


def test_upload_has_the_declared_schema(rule: Aggregator, round: int) -> None:
    state = start()
    assert upload(rule, state, round, 0).schema == rule.upload_schema(state.adapter.schema, round)


def test_frozen_arrays_stay_bit_for_bit(rule: Aggregator, round: int) -> None:
    state = start()
    result = aggregate(rule, state, round, uploads(rule, state, round), WEIGHTS)
    frozen = state.adapter.keys() - rule.trainable(state.adapter, round)
    assert result.adapter.schema == state.adapter.schema
    for name in frozen:
        assert np.array_equal(result.adapter[name], state.adapter[name])
        assert name not in rule.upload_schema(state.adapter.schema, round)
    for name in rule.upload_schema(state.adapter.schema, round):
        assert not np.array_equal(result.adapter[name], state.adapter[name])


def test_finish_is_pure(rule: Aggregator, round: int) -> None:
    state = start()
    hash_before = state.stored().content_hash
    accumulator = accumulated(rule, state, round, uploads(rule, state, round), WEIGHTS)
    once, twice = (accumulator.finish()[0].stored() for _ in range(2))
    assert once.content_hash == twice.content_hash
    assert state.stored().content_hash == hash_before


def test_what_a_rule_keeps_for_itself_outlasts_a_round_and_is_not_sent(rule: Aggregator, round: int) -> None:
    own = Adapter({"optimizer.momentum": np.arange(3, dtype=np.float32)})
    state = replace(start(), optimizer=own)
    after = aggregate(rule, state, round, uploads(rule, state, round), WEIGHTS)
    assert after.optimizer.content_hash == own.content_hash
    assert not any(name.startswith(OPTIMIZER) for name in rule.download(after, round + 1))
    again = GlobalState.from_stored(Adapter.from_bytes(after.stored().to_bytes()))
    assert again == GlobalState(again.adapter, again.residual, again.optimizer)
    assert again.stored().content_hash == after.stored().content_hash
    # What came over the wire under such a name is an array like any other, and so one too many.
    assert "optimizer.momentum" in GlobalState.from_sent(after.stored()).adapter


def test_a_site_rebuilds_the_state_from_its_seeded_start_and_the_download(
    rule: Aggregator, round: int
) -> None:
    seeded = start()
    state = seeded
    for now in range(round, round + 3):
        updates = [upload(rule, state, now, 10 * now + k) for k in range(len(WEIGHTS))]
        state = aggregate(rule, state, now, updates, WEIGHTS)
    received = GlobalState.from_sent(seeded.adapter.updated(rule.download(state, round + 3)))
    assert received.stored().content_hash == state.stored().content_hash


def test_no_weight_is_refused_rather_than_divided_by(rule: Aggregator, round: int) -> None:
    state = start()
    with refuses(AdapterError, "no-weight"):
        aggregate(rule, state, round, [upload(rule, state, round, 0)], (0.0,))


def test_configuration_round_trips_through_json(rule: Aggregator, round: int) -> None:
    for weighting in ("examples", "uniform"):
        configured = rule.model_copy(update={"weighting": weighting})
        parsed = TypeAdapter(AggregationRule).validate_json(configured.canonical_json())
        assert type(parsed) is type(rule)
        assert parsed == configured


def held_bytes(rule: Aggregator, state: GlobalState, round: int, cohort: int) -> int:
    """Bytes that an accumulator holds on to after `cohort` updates, each freshly received.

    Counted is what was asked for beneath this function: other threads of the process allocate too.
    """
    payload = upload(rule, state, round, 0).to_bytes()

    def hold(cohort: int) -> Accumulator:
        accumulator = rule.init(state, round)
        for _ in range(cohort):
            accumulator.add("site", Adapter.from_bytes(payload), 2.0)
        return accumulator

    hold(20)  # what Python, numpy and the parser keep for the next time is not the accumulator's
    gc.collect()
    tracemalloc.start(5)  # frames that are kept: the parser's lie between this one and an array
    try:
        accumulator = hold(cohort)
        gc.collect()
        traces = tracemalloc.take_snapshot().filter_traces(
            [tracemalloc.Filter(True, __file__, all_frames=True)]
        )
    finally:
        tracemalloc.stop()
    assert accumulator is not None
    return sum(line.size for line in traces.statistics("lineno"))


def test_a_linear_rule_holds_two_thousand_updates_in_the_memory_of_one(rule: Aggregator, round: int) -> None:
    state = start()
    if not rule.linear:
        assert held_bytes(rule, state, round, 20) > 5 * held_bytes(rule, state, round, 1)
        return
    # The slack is for a few Python objects; two thousand updates would be more than a megabyte.
    assert held_bytes(rule, state, round, 2_000) <= held_bytes(rule, state, round, 1) + 1024
