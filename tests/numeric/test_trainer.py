"""The stacked trainer: one site is PEFT's own training, K stacked sites are K sites alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engines import answer_all
from loaded_models import load_model
from pydantic import ValidationError
from transformers import TrainingArguments, get_scheduler

from quorate.client.site.site import Site
from quorate.client.trainer.fit import SiteTask, fit
from quorate.client.trainer.schedule import BatchPlan, lr_factor
from quorate.client.trainer.stack import AdapterStack
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.config.run_config import TrainingConfig
from quorate.shared.model.lora_model import LoadedModel
from quorate.shared.progress import ignore_step

TOLERANCE = 1e-5


def largest_difference(one: Adapter, other: Adapter) -> float:
    assert one.schema == other.schema
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def examples_of(run: Any, model: LoadedModel, rows: list[Any]) -> list[Any]:
    return run.task.weigh(run.task.encode(rows, model.processor))


def noisy(adapter: Adapter, seed: int) -> Adapter:
    """The adapter with lora_B moved off zero, where A would get no gradient."""
    draw = np.random.default_rng(seed)
    return adapter.map(lambda _, a: (a + 0.1 * draw.standard_normal(a.shape)).astype(np.float32))


def train(run: Any, sites: dict[str, list[Any]], starts: list[Adapter], round: int = 1) -> list[Any]:
    model = load_model(run)
    stack = AdapterStack.install(model)
    tasks = [
        SiteTask(name, examples_of(run, model, rows), start)
        for (name, rows), start in zip(sites.items(), starts, strict=True)
    ]
    return fit(stack, run, round, tasks, frozenset(model.initial), ignore_step)


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"optim": "sgd", "momentum": 0.9, "weight_decay": 0.01, "learning_rate": 0.05},
        {
            "gradient_accumulation_steps": 3,
            "weight_decay": 0.1,
            "warmup_ratio": 0.3,
            "lr_scheduler_type": "cosine",
        },
        {"max_steps": None, "num_train_epochs": 2, "max_grad_norm": 0.05},
        {"max_grad_norm": 0, "lr_scheduler_type": "constant"},
    ],
    ids=["adamw", "sgd", "accumulation", "epochs-clipped", "unclipped"],
)
@pytest.mark.parametrize("round", [1, 2])
def test_one_site_is_a_plain_peft_loop(
    make_run: Any, make_sites: Any, plain_peft_loop: Any, training: Any, round: int
) -> None:
    run = make_run(training=training)
    rows = make_sites(north=14)["north"]["train"]
    start = noisy(load_model(run).initial, 0)
    (fitted,) = train(run, {"north": rows}, [start], round)
    assert largest_difference(fitted.adapter, start) > 1e-3, "nothing was trained"
    assert largest_difference(fitted.adapter, plain_peft_loop(run, rows, start, round)) < TOLERANCE


@pytest.mark.parametrize(
    "adapter", [{"use_dora": True}, {"use_rslora": True}, {"target_modules": "all-linear"}]
)
def test_variants_train_as_in_peft(
    make_run: Any, make_sites: Any, plain_peft_loop: Any, adapter: Any
) -> None:
    run = make_run(adapter=adapter)
    rows = make_sites(north=14)["north"]["train"]
    start = noisy(load_model(run).initial, 1)
    (fitted,) = train(run, {"north": rows}, [start])
    assert largest_difference(fitted.adapter, plain_peft_loop(run, rows, start, 1)) < TOLERANCE


@pytest.mark.parametrize("adapter", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_a_stack_of_one_has_pefts_own_logits(make_run: Any, make_sites: Any, adapter: Any) -> None:
    run = make_run(adapter=adapter)
    model = load_model(run)
    start = noisy(model.initial, 2)
    batch = run.task.collate(examples_of(run, model, make_sites(a=6)["a"]["train"]), model.processor)
    model.write_adapter(start)
    with torch.no_grad():
        plain = model.peft(**batch.inputs).logits
        AdapterStack.install(model).load([start], ())
        stacked = model.peft(**batch.inputs).logits
    assert torch.allclose(plain, stacked, atol=TOLERANCE, rtol=0)


def of_rank(adapter: Adapter, r: int) -> Adapter:
    """Its first r rows of A and columns of B."""
    shapes = {
        n: (r, s[1]) if ".lora_A" in n else (s[0], r) if ".lora_B" in n else s
        for n, s in adapter.schema.items()
    }
    return adapter.cropped(shapes)


def test_a_site_of_a_lower_rank_in_a_stack_ends_as_in_a_model_of_that_rank(
    make_run: Any, make_sites: Any
) -> None:
    high, low = (
        make_run(adapter={"r": r, "lora_alpha": 2 * r}, training={"weight_decay": 0.1}) for r in (4, 2)
    )
    rows = {site: splits["train"] for site, splits in make_sites(a=14, b=9).items()}
    start = noisy(load_model(high).initial, 4)
    small = of_rank(start, 2)
    whole, part = train(high, rows, [start, small])
    assert largest_difference(part.adapter, small) > 1e-3, "nothing was trained"
    (alone,) = train(low, {"b": rows["b"]}, [small])
    assert largest_difference(part.adapter, alone.adapter) < TOLERANCE
    (full,) = train(high, {"a": rows["a"]}, [start])
    assert largest_difference(whole.adapter, full.adapter) < TOLERANCE


SIZES = {"a": 31, "b": 3, "c": 12, "d": 8, "e": 1, "f": 22, "g": 17, "h": 5}


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"max_steps": None, "num_train_epochs": 2}},
        {"training": {"max_steps": None, "gradient_accumulation_steps": 2, "optim": "sgd"}},
        {"adapter": {"lora_dropout": 0.2}},
        # AdamW turns the last bit of a gradient below its epsilon into a step; DoRA has such gradients.
        {
            "adapter": {"lora_dropout": 0.2, "use_dora": True},
            "training": {"max_steps": None, "adam_epsilon": 1e-5},
        },
        {"task": {"class_weights": "balanced"}},
    ],
    ids=["unequal-steps", "accumulation", "dropout", "dora-dropout", "weighted"],
)
def test_eight_stacked_sites_are_eight_sites_alone(make_run: Any, make_sites: Any, sections: Any) -> None:
    run = make_run(**sections)
    sites = {name: site["train"] for name, site in make_sites(**SIZES).items()}
    initial = load_model(run).initial
    starts = [noisy(initial, seed) for seed in range(len(sites))]
    together = train(run, sites, starts)
    if run.training.max_steps is None:
        assert len({fitted.steps for fitted in together}) > 2, "sites must finish at different steps"
    for (name, rows), start, fitted in zip(sites.items(), starts, together, strict=True):
        (alone,) = train(run, {name: rows}, [start])
        assert fitted.steps == alone.steps
        assert largest_difference(fitted.adapter, alone.adapter) < TOLERANCE, name
        assert fitted.metrics == pytest.approx(alone.metrics, rel=1e-4), name


def test_dropout_changes_the_result(make_run: Any, make_sites: Any) -> None:
    rows = make_sites(a=12)["a"]["train"]
    with_dropout = make_run(adapter={"lora_dropout": 0.5})
    start = noisy(load_model(with_dropout).initial, 0)
    dry = train(make_run(), {"a": rows}, [start])[0].adapter
    wet = train(with_dropout, {"a": rows}, [start])[0].adapter
    assert largest_difference(dry, wet) > 1e-4


DRAWS: list[dict[str, Any]] = [
    {"adapter": {"lora_dropout": 0.5}},
    {"training": {"base_dropout": True}},
    {"task": {"token_dropout": 0.5}},
]


@pytest.mark.parametrize("sections", DRAWS, ids=["dropout", "base dropout", "augmentation"])
def test_what_is_drawn_differs_between_sites_rounds_steps_and_passes(
    make_run: Any, make_sites: Any, sections: dict[str, Any]
) -> None:
    """All rows are one row and nothing moves, so only draws tell a site, round, step or pass from another."""
    rows = make_sites(a=1)["a"]["train"] * 12
    start = noisy(load_model(make_run()).initial, 0)

    def loss(site: str, round: int = 1, steps: int = 1, passes: int = 1, **drawing: Any) -> float:
        still = {"learning_rate": 1e-30, "max_steps": steps, "gradient_accumulation_steps": passes}
        run = make_run(**{**drawing, "training": {**still, **drawing.get("training", {})}})
        return float(train(run, {site: rows}, [start], round)[0].metrics["train_loss"])

    assert loss("b", 2, 3, 2) == pytest.approx(loss("a"), rel=1e-6)
    once = loss("a", **sections)
    assert loss("a", **sections) == once
    for other in (("b",), ("a", 2), ("a", 1, 2), ("a", 1, 1, 2)):
        assert abs(loss(*other, **sections) - once) > 1e-4, other


def test_base_dropout_is_off_unless_asked_for(make_run: Any, make_sites: Any) -> None:
    rows = make_sites(a=12)["a"]["train"]
    start = load_model(make_run()).initial
    with_dropout = make_run(training={"base_dropout": True})
    results = [
        train(run, {"a": rows}, [start])[0].adapter for run in (make_run(), with_dropout, with_dropout)
    ]
    assert largest_difference(results[0], results[1]) > 1e-4
    assert results[1].content_hash == results[2].content_hash, "the seed decides the base's dropout too"


def test_bf16_autocast_trains_float32_adapters(make_run: Any, make_sites: Any) -> None:
    rows = make_sites(a=12)["a"]["train"]
    start = load_model(make_run()).initial
    exact = train(make_run(), {"a": rows}, [start])[0].adapter
    coarse = train(make_run(training={"bf16": True}), {"a": rows}, [start])[0].adapter
    assert 0 < largest_difference(exact, coarse) < 0.1


def test_frozen_arrays_do_not_move(make_run: Any, make_sites: Any) -> None:
    run = make_run()
    model = load_model(run)
    stack = AdapterStack.install(model)
    start = noisy(model.initial, 0)
    task = SiteTask("a", examples_of(run, model, make_sites(a=9)["a"]["train"]), start)
    trainable = frozenset(name for name in start if "lora_B" in name)
    (fitted,) = fit(stack, run, 1, [task], trainable, ignore_step)
    moved = {name for name in start if not np.array_equal(start[name], fitted.adapter[name])}
    assert moved == trainable


def test_the_frozen_base_does_not_move(make_run: Any, make_sites: Any) -> None:
    run = make_run()
    model = load_model(run)
    before = {n: p.clone() for n, p in model.peft.named_parameters() if not p.requires_grad}
    stack = AdapterStack.install(model)
    task = SiteTask("a", examples_of(run, model, make_sites(a=9)["a"]["train"]), model.initial)
    fit(stack, run, 1, [task], frozenset(model.initial), ignore_step)
    after = dict(model.peft.named_parameters())
    assert before and all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_site_with_nan_spoils_no_other(make_run: Any, make_sites: Any) -> None:
    run = make_run()
    sites = {name: site["train"] for name, site in make_sites(a=9, b=9).items()}
    start = load_model(run).initial
    broken = start.map(lambda _, array: np.full_like(array, np.nan))
    good, bad = train(run, sites, [start, broken])
    good.adapter.check_finite()
    assert not np.isfinite(bad.adapter["base_model.model.classifier.weight"]).all()


@pytest.mark.parametrize("kind", ["constant", "constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize("field", ["warmup_ratio", "warmup_steps"])
@pytest.mark.parametrize("warmup", [0.0, 0.25, 3])
def test_schedules_are_those_of_transformers(kind: str, field: str, warmup: float) -> None:
    total = 12
    if warmup >= 1 and field == "warmup_ratio":
        warmup /= total
    config = TrainingConfig(lr_scheduler_type=kind, learning_rate=1.0, **{field: warmup})  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if kind == "constant" else kind
    steps = TrainingArguments(warmup_steps=warmup, report_to=[]).get_warmup_steps(total)
    theirs = get_scheduler(name, optimizer, steps, total)
    for step in range(total):
        assert lr_factor(config, step, total) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_a_warmup_is_said_once_and_in_whole_steps() -> None:
    with pytest.raises(ValidationError) as caught:
        TrainingConfig(warmup_ratio=0.1, warmup_steps=3)
    said = caught.value.errors()[0]["msg"]
    assert "warmup_ratio" in said and "warmup_steps" in said
    with pytest.raises(ValidationError) as caught:
        TrainingConfig(warmup_steps=2.5)
    assert "warmup_steps 2.5" in caught.value.errors()[0]["msg"]


def test_the_walk_through_a_sites_rows_covers_every_epoch_and_continues_across_rounds() -> None:
    config = TrainingConfig(max_steps=2, per_device_train_batch_size=5)
    plan = BatchPlan(rows=7, training=config, seed=1, site="a")
    seen = [row for round in range(1, 8) for step in plan.steps(round) for micro in step for row in micro]
    epochs = [seen[i : i + 7] for i in range(0, len(seen), 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1, "epochs are reshuffled"
    assert plan.steps(3) == BatchPlan(7, config, 1, "a").steps(3)
    assert plan.steps(1) != BatchPlan(7, config, 1, "b").steps(1)


def test_handle_answers_one_request_as_it_answers_the_cohort(make_run: Any, make_sites: Any) -> None:
    """The seam: a ClientApp passes one request, the in-process grid the cohort."""
    from quorate.shared.protocol.messages import RequestHeader, RoundRequest

    site = Site(make_sites(a=9, b=14, c=2))
    run = site.prepare(make_run(adapter={"lora_dropout": 0.1}))
    start = load_model(run).initial

    def ask(name: str) -> RoundRequest:
        header = RequestHeader(
            run_id="r", round=1, phase="fit", site=name,
            run_config=run.canonical_json(), config_hash=run.content_hash,
        )  # fmt: skip
        return RoundRequest(header, start)

    together = answer_all(site, [ask(name) for name in site.names])
    for name, update in zip(site.names, together, strict=True):
        (alone,) = answer_all(site, [ask(name)])
        assert update.header.error is None and update.header.site == name
        assert largest_difference(update.arrays, alone.arrays) < TOLERANCE
