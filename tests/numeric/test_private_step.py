"""The private step: Poisson batches, units that count once, as much noise as was asked for."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loaded_models import load_model
from refusals import refuses
from row_gradients import kept, noisy

from quorate.client.trainer.dp import dp_sgd
from quorate.client.trainer.dp.clipping import ClippedGradientSum
from quorate.client.trainer.dp.dp_sgd import draw_batch, units_of
from quorate.client.trainer.dp.noise import secret_generator, with_noise
from quorate.client.trainer.dp.plan import private_plan
from quorate.client.trainer.fit import Fitted, SiteTask, fit
from quorate.client.trainer.passes import training_mode
from quorate.client.trainer.stack import AdapterStack
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ConfigError
from quorate.shared.privacy.accounting import epsilon
from quorate.shared.privacy.rounding import at_most
from quorate.shared.privacy.secure_random import CipherSource, SeededSource, secret_source
from quorate.shared.progress import StepEvent, ignore_step

SOURCES = [SeededSource, CipherSource]
CPU = torch.device("cpu")
NEXT_TO_NOTHING = {"unit": "record", "noise_multiplier": 1e-30, "max_grad_norm": 1e20}


def train(
    run: RunConfig,
    sites: dict[str, list[Any]],
    starts: list[Adapter],
    groups: dict[str, list[str]] | None = None,
    on_step: Any = ignore_step,
) -> list[Fitted]:
    model = load_model(run)
    stack = AdapterStack.install(model)
    tasks = [
        SiteTask(name, run.task.encode(rows, model.processor), start, (groups or {}).get(name))
        for (name, rows), start in zip(sites.items(), starts, strict=True)
    ]
    return fit(stack, run, 1, tasks, frozenset(model.initial), on_step)


def largest_difference(one: Adapter, other: Adapter) -> float:
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


# Without noise and without clipping, a private step is a step.


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"optim": "sgd", "learning_rate": 0.05}},
        {"training": {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_ratio": 0.3}},
        {"adapter": {"use_dora": True}, "training": {"adam_epsilon": 1e-5}},
        {"training": {"gradient_checkpointing": True}},
        {"task": {"class_weights": [0.5, 1.0, 2.0], "label_smoothing": 0.1, "focal_gamma": 1.0}},
    ],
    ids=["sgd", "adamw", "dora", "checkpointing", "weighted"],
)
def test_without_noise_and_clipping_a_private_step_is_a_plain_one(
    make_run: Any, make_sites: Any, sections: Any
) -> None:
    """Every row is drawn (probability 1), in several passes; of three stacked sites two have fewer rows."""
    training = {
        "max_steps": None,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "max_grad_norm": 0,
        **sections.get("training", {}),
    }
    plain = make_run(**{**sections, "training": training})
    secret = make_run(**{**sections, "training": training}, privacy=NEXT_TO_NOTHING)
    sites = {name: site["train"] for name, site in make_sites(a=12, b=5, c=9).items()}
    starts = [noisy(load_model(plain).initial, seed) for seed in range(3)]
    weighed = load_model(plain)
    expected = []
    for (name, rows), start in zip(sites.items(), starts, strict=True):
        examples = plain.task.weigh(plain.task.encode(rows, weighed.processor))
        task = SiteTask(name, examples, start)
        model = load_model(plain)
        expected += fit(AdapterStack.install(model), plain, 1, [task], frozenset(model.initial), ignore_step)
    model = load_model(secret)
    tasks = [
        SiteTask(name, secret.task.weigh(secret.task.encode(rows, model.processor)), start)
        for (name, rows), start in zip(sites.items(), starts, strict=True)
    ]
    found = fit(AdapterStack.install(model), secret, 1, tasks, frozenset(model.initial), ignore_step)
    for start, one, other in zip(starts, found, expected, strict=True):
        assert one.steps == other.steps == 3
        assert largest_difference(one.adapter, start) > 1e-3
        assert largest_difference(one.adapter, other.adapter) < 1e-5


def test_a_site_of_a_lower_rank_steps_privately_as_in_a_model_of_that_rank(
    make_run: Any, make_sites: Any
) -> None:
    training = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "max_grad_norm": 0}
    rows = {site: splits["train"] for site, splits in make_sites(a=12, b=5).items()}
    secret, low = (
        make_run(training=training, adapter={"r": r, "lora_alpha": 2 * r}, privacy=NEXT_TO_NOTHING)
        for r in (4, 2)
    )
    start, small = noisy(load_model(secret).initial, 0), noisy(load_model(low).initial, 1)
    _, part = train(secret, rows, [start, small])
    (alone,) = train(low, {"b": rows["b"]}, [small])
    assert largest_difference(part.adapter, small) > 1e-3
    assert largest_difference(part.adapter, alone.adapter) < 1e-5


def test_stacked_sites_take_steps_of_their_own(make_run: Any, make_sites: Any) -> None:
    training = {"max_steps": None, "num_train_epochs": 2, "per_device_train_batch_size": 3}
    run = make_run(training=training, privacy={"unit": "record", "noise_multiplier": 1.0})
    sites = {name: site["train"] for name, site in make_sites(a=12, b=2, c=7).items()}
    initial = load_model(run).initial
    events: list[StepEvent] = []
    found = train(run, sites, [initial] * 3, on_step=events.append)
    assert [fitted.steps for fitted in found] == [8, 2, 6]
    events = [event for event in events if event.taken]
    assert [event.sites for event in events] == [("a", "b", "c")] * 2 + [("a", "c")] * 4 + [("a",)] * 2
    assert {event.loss for event in events} == {None}, "a loss is a figure of rows"
    for fitted in found:
        assert fitted.metrics.keys() == {
            "learning_rate",
            "noise_multiplier",
            "clipping_norm",
            "sampling_probability",
        }


# What one unit can do.


@settings(max_examples=200)
@given(data=st.data())
def test_removing_one_unit_moves_the_sum_by_at_most_the_clipping_norm(data: Any) -> None:
    """Whatever the gradients (infinite ones too) and however the rows are cut into passes."""
    counts = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5), label="rows of each unit")
    scales = data.draw(
        st.lists(
            st.sampled_from([0.0, 1e-12, 0.3, 1.0, 50.0, 1e25, math.inf, math.nan]),
            min_size=sum(counts),
            max_size=sum(counts),
        ),
        label="size of each row's gradient",
    )
    removed = data.draw(st.integers(0, len(counts) - 1))
    size = data.draw(st.integers(1, 5), label="rows in a pass")
    norm = data.draw(st.sampled_from([1e-3, 1.0, 7.0]))
    units = [unit for unit, count in enumerate(counts) for _ in range(count)]
    rows = _gradients(scales, seed=data.draw(st.integers(0, 9)))
    whole = clipped(rows, units, list(range(len(units))), size, norm)
    rest = clipped(rows, units, [row for row, unit in enumerate(units) if unit != removed], size, norm)
    assert distance(whole, rest) <= norm * (1 + 1e-5) + 1e-6
    assert all(torch.isfinite(total).all() for total in whole.values())


def _gradients(scales: list[float], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor(scales)
    return {
        "matrix": torch.randn(len(scales), 3, 2, generator=generator) * size[:, None, None],
        "vector": torch.randn(len(scales), 4, generator=generator) * size[:, None],
    }


def clipped(
    rows: dict[str, torch.Tensor], units: list[int], chosen: list[int], size: int, norm: float
) -> dict[str, torch.Tensor]:
    """The sum over the chosen rows, cut into passes as the private step cuts a batch."""
    shapes = {name: tuple(each.shape[1:]) for name, each in rows.items()}
    total = ClippedGradientSum(shapes, norm, CPU)
    for pairs, goes_on in dp_sgd._passes([(units[row], row) for row in chosen], size):
        part = {name: each[[row for _, row in pairs]] for name, each in rows.items()}
        total.add(part, [unit for unit, _ in pairs], goes_on=goes_on)
    return total.total


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((one[name] - other[name]).double().square().sum()) for name in one))


def test_a_unit_that_counts_twice_would_be_caught() -> None:
    """The check above must fail where a row is drawn twice, or a group's rows are clipped one by one."""
    rows = _gradients([50.0, 50.0], seed=0)
    rows = {name: each[[0, 0, 1]] for name, each in rows.items()}
    once = clipped(rows, [0, 0, 1], [0, 1, 2], 8, 1.0)
    assert distance(once, clipped(rows, [0, 0, 1], [2], 8, 1.0)) <= 1 + 1e-5
    twice = clipped(rows, [0, 5, 1], [0, 1, 2], 8, 1.0)
    assert distance(twice, clipped(rows, [0, 5, 1], [2], 8, 1.0)) > 1.9


def test_a_group_is_clipped_as_the_sum_of_its_rows(make_run: Any, make_sites: Any) -> None:
    run = make_run()
    rows = make_sites(a=6)["a"]["train"]
    start = noisy(load_model(run).initial, 0)
    (each,) = kept(run, [rows], [start])
    whole = ClippedGradientSum(start.schema, 1.0, CPU)
    whole.add(each, [0, 0, 0, 1, 1, 1])
    by_hand = (
        {name: g[:3].sum(dim=0) for name, g in each.items()},
        {name: g[3:].sum(dim=0) for name, g in each.items()},
    )
    norms = [math.sqrt(sum(float(g.square().sum()) for g in group.values())) for group in by_hand]
    assert min(norms) > 1, "both are clipped"
    for name, total in whole.total.items():
        expected = sum(group[name] / norm for group, norm in zip(by_hand, norms, strict=True))
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-6)


def test_clipping_and_scaling_are_those_of_opacus(make_run: Any, make_sites: Any) -> None:
    optimizers = pytest.importorskip("opacus.optimizers")
    run = make_run()
    rows = make_sites(a=7)["a"]["train"]
    start = noisy(load_model(run).initial, 0)
    (each,) = kept(run, [rows], [start])
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in each.values()]).norm(dim=0)
    norm = float(norms.median())
    assert norms.min() < norm < norms.max(), "some are clipped and some are not"
    parameters = {name: torch.nn.Parameter(torch.from_numpy(start[name].copy())) for name in start}
    theirs = optimizers.DPOptimizer(
        torch.optim.SGD(parameters.values(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=norm,
        expected_batch_size=5,
    )
    for name, parameter in parameters.items():
        parameter.grad_sample = each[name].clone()
    theirs.pre_step()
    ours = ClippedGradientSum(start.schema, norm, CPU)
    ours.add({name: g[:4] for name, g in each.items()}, [0, 1, 2, 3])
    ours.add({name: g[4:] for name, g in each.items()}, [4, 5, 6])
    for name, noisy_sum in ours.noised(SeededSource(), 0.0).items():
        torch.testing.assert_close(noisy_sum / 5, parameters[name].grad, rtol=1e-5, atol=1e-7)


# Batches.


@pytest.mark.parametrize("source", SOURCES)
def test_sizes_of_batches_are_binomial(source: Any) -> None:
    count, probability, draws = 200, 0.1, 4000
    units, drawn = units_of(count, None), source()
    batches = [draw_batch(units, probability, 1, drawn) for _ in range(draws)]
    sizes = np.array([len(batch) for batch in batches])
    variance = count * probability * (1 - probability)
    assert abs(sizes.mean() - count * probability) < 5 * math.sqrt(variance / draws)
    assert abs(sizes.var() - variance) < 5 * variance * math.sqrt(2 / draws)
    taken = np.bincount([row for batch in batches for _, row in batch], minlength=count)
    assert abs(taken - draws * probability).max() < 5.5 * math.sqrt(draws * probability * (1 - probability))


def test_a_drawn_group_brings_some_of_its_rows_afresh() -> None:
    groups = ["a"] * 7 + ["b"] * 2 + ["a"]
    random.Random(0).shuffle(groups)
    units = units_of(len(groups), groups)
    assert sorted(map(len, units)) == [2, 8]
    source, seen = SeededSource(), set()
    for _ in range(200):
        batch = draw_batch(units, 1.0, 3, source)
        assert [unit for unit, _ in batch] == sorted(unit for unit, _ in batch), "units stand together"
        rows = [row for _, row in batch]
        assert len(rows) == len(set(rows)) == 5
        assert all(row in units[unit] for unit, row in batch)
        seen |= set(rows)
    assert seen == set(range(len(groups)))


def test_groups_are_units_of_the_step(make_run: Any, make_sites: Any) -> None:
    """A group's rows count as one unit in the plan, and the step divides by the expected number of groups."""
    rows = make_sites(a=12)["a"]["train"]
    group = {**NEXT_TO_NOTHING, "unit": "group", "max_records_per_group": 9}
    training = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0}
    run = make_run(training={**training, "per_device_train_batch_size": 5}, privacy=group)
    start = noisy(load_model(run).initial, 0)
    groups = [f"patient-{index % 4}" for index in range(12)]
    (grouped,) = train(run, {"a": rows}, [start], {"a": groups})
    plain = make_run(training={**training, "per_device_train_batch_size": 12, "learning_rate": 0.03})
    (expected,) = train(plain, {"a": rows}, [start])  # a sum over 12 rows by 4 groups is 3 times their mean
    assert largest_difference(start, grouped.adapter) > 1e-3
    assert largest_difference(expected.adapter, grouped.adapter) < 1e-5


# Noise.


@pytest.mark.parametrize("secure", [False, True])
def test_noise_of_an_empty_batch_is_sigma_c_over_b(
    make_run: Any, make_sites: Any, monkeypatch: pytest.MonkeyPatch, secure: bool
) -> None:
    """No row is drawn; two steps are taken, noised and counted all the same."""
    monkeypatch.setattr(dp_sgd, "draw_batch", lambda *_: [])
    sigma, norm, batch = 1.7, 0.4, 5
    run = make_run(
        training={
            "max_steps": 2,
            "optim": "sgd",
            "learning_rate": 1.0,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": batch,
        },
        privacy={
            "unit": "record",
            "noise_multiplier": sigma,
            "max_grad_norm": norm,
            "secure_rng": secure,
        },
    )
    rows = make_sites(a=40)["a"]["train"]
    start = load_model(run).initial
    (fitted,) = train(run, {"a": rows}, [start])
    assert fitted.steps == 2
    moved = np.concatenate([(fitted.adapter[name] - start[name]).ravel() for name in start])
    expected = math.sqrt(2) * sigma * norm / batch
    assert abs(moved.std() / expected - 1) < 5 / math.sqrt(2 * len(moved))
    assert abs(moved.mean()) < 5 * expected / math.sqrt(len(moved))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("count", [1, 3, 100_000])
def test_draws_are_standard_normal_and_uniform(source: Any, count: int) -> None:
    drawn = source()
    normal = np.concatenate([drawn.normal(count) for _ in range(max(1, 30_000 // count))])
    n = len(normal)
    assert abs(normal.mean()) < 5 / math.sqrt(n)
    assert abs(normal.std() - 1) < 5 / math.sqrt(2 * n)
    assert abs((normal**3).mean()) < 5 * math.sqrt(15 / n) and abs((normal**4).mean() - 3) < 5 * math.sqrt(
        96 / n
    )
    assert abs((normal[1:] * normal[:-1]).mean()) < 5 / math.sqrt(n), "neighbours are independent"
    assert abs((normal[1:] ** 2 * normal[:-1] ** 2).mean() - 1) < 5 * math.sqrt(8 / n)
    uniform = drawn.uniform(20_000)
    assert uniform.min() >= 0 and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 5 / math.sqrt(12 * 20_000)
    assert len(set(drawn.subset(5, 9))) == 5 and sorted(drawn.subset(9, 4)) == [0, 1, 2, 3]


def test_noise_leaves_the_sum_in_its_own_precision() -> None:
    total = torch.full((50_000,), 3.0)
    noised = with_noise(SeededSource(), total, 2.0)
    assert noised.dtype == torch.float32 and torch.equal(total, torch.full((50_000,), 3.0))
    assert abs(float(noised.mean()) - 3) < 5 * 2 / math.sqrt(50_000)


# Nobody can draw it again.


@pytest.mark.parametrize("secure", [False, True])
def test_two_runs_of_one_seed_differ(make_run: Any, make_sites: Any, secure: bool) -> None:
    privacy = {"unit": "record", "noise_multiplier": 1.0, "secure_rng": secure}
    run = make_run(training={"max_steps": 1}, privacy=privacy)
    rows = make_sites(a=9)["a"]["train"]
    start = load_model(run).initial
    ends = []
    for _ in range(2):
        torch.manual_seed(run.seed), np.random.seed(run.seed), random.seed(run.seed)
        ends.append(train(run, {"a": rows}, [start])[0].adapter)
    assert largest_difference(*ends) > 1e-4


@pytest.mark.parametrize("source", SOURCES)
def test_seeds_of_the_process_decide_no_draw(source: Any) -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        masks = torch.rand(4, generator=secret_generator(CPU))
        drawn.append((tuple(source().normal(4)), tuple(source().uniform(4)), tuple(masks.tolist())))
    assert not set(drawn[0]) & set(drawn[1])


def test_torchs_own_generator_on_the_cpu_would_be_no_secret() -> None:
    """Why noise is not drawn from one: it takes 32 bits of its seed."""
    one, other = (torch.Generator().manual_seed(seed) for seed in (5, 5 + 2**32))
    assert torch.equal(torch.rand(9, generator=one), torch.rand(9, generator=other))


# The plan.


def test_the_plan_covers_every_step_of_the_run(make_run: Any) -> None:
    training = {"max_steps": None, "num_train_epochs": 2, "gradient_accumulation_steps": 3}
    privacy = {"unit": "record", "target_epsilon": 3.0, "delta": 1e-5, "max_grad_norm": 0.5}
    run = make_run(training=training, privacy=privacy, federation={"rounds": 4})
    plan = private_plan(run, 100)
    assert plan.sampling_probability == pytest.approx(12 / 100) and plan.expected_batch == pytest.approx(12)
    assert plan.steps_per_round == 2 * math.ceil(100 / 12) == plan.event().steps
    claim = plan.claim()
    assert (claim.steps, claim.units, claim.delta, claim.clipping_norm) == (4 * 18, 100, 1e-5, 0.5)
    assert 2.95 < claim.epsilon <= 3.0
    assert epsilon([plan.event()] * 4, 1e-5) == pytest.approx(claim.epsilon)
    assert at_most(claim.epsilon) in claim.sentence and "100 records" in claim.sentence


def test_a_site_smaller_than_the_batch_uses_all_its_rows_in_each_step(make_run: Any) -> None:
    run = make_run(privacy={"unit": "record", "noise_multiplier": 2.0})
    plan = private_plan(run, 3)
    assert (plan.sampling_probability, plan.expected_batch, plan.steps_per_round) == (1.0, 3.0, 3)
    assert plan.noise_multiplier == 2.0 and plan.delta == 1e-5
    assert private_plan(run, 200_000).delta == pytest.approx(5e-7), "well below one unit's share"
    hardly = make_run(privacy={"unit": "record", "noise_multiplier": 1e-4})
    with refuses(ConfigError, "too-little-noise") as caught:
        private_plan(hardly, 30).claim()
    assert "privacy.noise_multiplier 0.0001" in str(caught.value)
    large = make_run(privacy={"unit": "record", "noise_multiplier": 2.0, "delta": 0.01})
    with refuses(ConfigError, "delta-too-large"):
        private_plan(large, 101)


def test_a_dropout_generator_starts_from_more_than_a_seed_of_32_bits() -> None:
    """Its first numbers are those of a Mersenne Twister whose every word was drawn: no seed leads there."""
    generator = secret_generator(CPU)
    state = generator.get_state().numpy().copy()
    words = state[24 : 24 + 8 * 624].view(np.uint64)
    assert (words < 2**32).all() and len(np.unique(words)) > 600
    known = np.random.MT19937()
    known.state = {"bit_generator": "MT19937", "state": {"key": words.astype(np.uint32), "pos": 624}}
    raw = known.random_raw(2000)
    expected = (raw & (2**24 - 1)).astype(np.float32) * np.float32(2**-24)
    np.testing.assert_array_equal(torch.rand(2000, generator=generator).numpy(), expected)
    other = secret_generator(CPU).get_state().numpy()[24 : 24 + 8 * 624].view(np.uint64)
    assert (words != other).mean() > 0.99
    # What seeding does instead: word by word from the first one, which a seed of 32 bits is.
    seeded = torch.Generator().manual_seed(5).get_state().numpy()[24 : 24 + 8 * 624].view(np.uint64)
    assert (
        torch.Generator().manual_seed(5 + 2**32).get_state().numpy()[24:].tobytes()[:4992] == seeded.tobytes()
    )
    recurrence = [
        (1812433253 * (int(w) ^ (int(w) >> 30)) + at + 1) % 2**32 for at, w in enumerate(words[:-1])
    ]
    assert recurrence[:20] != words[1:21].tolist()


def test_private_training_leaves_no_global_generator_seeded(make_run: Any, monkeypatch: Any) -> None:
    """The base's own dropout is refused; were anything to draw from the global generator, none is known."""
    run = make_run(privacy={"unit": "record", "noise_multiplier": 1.0})
    model = load_model(run)
    stack = AdapterStack.install(model)
    before = torch.random.get_rng_state()
    drawn = []
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeded with at most 64 bits"))
    for _ in range(2):
        with training_mode(stack, run, seed=None):
            drawn.append(torch.rand(8))
    assert not torch.equal(*drawn) and torch.equal(torch.random.get_rng_state(), before)


def test_noise_is_cryptographic_unless_it_is_switched_off(make_run: Any) -> None:
    assert make_run(privacy={"unit": "record", "noise_multiplier": 1.0}).privacy.secure_rng
    assert isinstance(secret_source(True), CipherSource)
