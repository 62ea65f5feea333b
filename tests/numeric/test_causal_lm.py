"""Causal language models: what is learnt and what is not, packing, stacking, the figures of an evaluation."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_lm
import torch
from refusals import refuses
from tiny_lm import lm_rows, lm_run

from quorate.client.trainer.evaluate import evaluate
from quorate.client.trainer.fit import SiteTask, fit
from quorate.client.trainer.stack import AdapterStack
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.errors import ModelError
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.model.lora_model import load_model
from quorate.shared.progress import ignore_step
from quorate.shared.tasks import causal_lm
from quorate.shared.tasks.task import Batch, Row
from quorate.shared.tasks.text.sequences import IGNORED

KINDS = ("llama", "gpt2", "qwen2", "mistral", "opt")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny_lm.save(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return of


def largest_difference(a: Adapter, b: Adapter) -> float:
    assert a.schema == b.schema
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def noisy(adapter: Adapter, seed: int) -> Adapter:
    draw = np.random.default_rng(seed)
    return adapter.map(lambda _, a: (a + 0.1 * draw.standard_normal(a.shape)).astype(np.float32))


def train(run: Any, sites: dict[str, list[Row]], starts: list[Adapter] | None = None) -> list[Any]:
    model = load_model(run)
    stack = AdapterStack.install(model)
    encoded = [run.task.encode(rows, model.processor) for rows in sites.values()]
    tasks = [
        SiteTask(name, run.task.weigh(run.task.pack(examples)), start)
        for name, examples, start in zip(
            sites, encoded, starts or [noisy(model.initial, 0)] * len(sites), strict=True
        )
    ]
    return fit(stack, run, 1, tasks, frozenset(model.initial), ignore_step)


def batch_of(run: Any, model: Any, rows: list[Row]) -> Batch:
    return run.task.collate(run.task.encode(rows, model.processor), model.processor)


def test_prompt_tokens_get_no_gradient_and_completion_tokens_do(folder: Any) -> None:
    run = lm_run(folder("llama"))
    model = load_model(run)
    batch = batch_of(run, model, lm_rows(5, 0))
    logits = run.task.forward(model.peft, batch).detach().requires_grad_()
    run.task.loss(logits, batch).sum().backward()
    assert logits.grad is not None
    for row, labels in enumerate(batch.targets):
        taught = {at for at, label in enumerate(labels.tolist()) if label != IGNORED}
        assert taught and min(taught) > 3, "a prompt stands before the completion"
        for at in range(labels.shape[0]):
            moved = bool(logits.grad[row, at].abs().max() > 0)
            assert moved == (at + 1 in taught), "only logits that predict a completion token may move"


def test_prompts_are_no_targets_and_completions_are(folder: Any) -> None:
    run = lm_run(folder("llama"))
    model = load_model(run)
    asked = {"prompt": "what is gout?", "completion": "pain"}
    batch = batch_of(run, model, [Row(asked, "a")])
    logits = run.task.forward(model.peft, batch).detach()
    loss = run.task.loss(logits, batch)
    # The same logits, as if the prompt (of the same length) had other tokens to be learnt.
    other = batch_of(run, model, [Row({**asked, "prompt": "who is there?"}, "a")])
    assert not torch.equal(other.inputs["input_ids"], batch.inputs["input_ids"])
    assert torch.equal(run.task.loss(logits, other), loss)
    other = batch_of(run, model, [Row({**asked, "completion": "gain"}, "a")])
    assert abs(float(run.task.loss(logits, other) - loss)) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_the_models_own_row_by_row_and_weighed_by_tokens_over_all(folder: Any, kind: str) -> None:
    run = lm_run(folder(kind))
    model = load_model(run)
    rows = lm_rows(6, 1)
    examples = run.task.weigh(run.task.encode(rows, model.processor))
    assert len({run.task.length(e) for e in examples}) > 2, "padding must happen"
    batch = run.task.collate(examples, model.processor)
    with torch.no_grad():
        logits = run.task.forward(model.peft, batch)
        ours, measured = run.task.loss(logits, batch), run.task.measured_loss(logits, batch)
        theirs = model.peft(**batch.inputs, labels=batch.targets).loss
        assert float(ours.mean()) == pytest.approx(float(theirs), abs=1e-5), "as Hugging Face averages"
        for example, loss, summed in zip(examples, ours, measured, strict=True):
            ids = torch.tensor([example.features["input_ids"]])
            alone = float(model.peft(input_ids=ids, labels=torch.tensor([example.target])).loss)
            assert float(loss) == pytest.approx(alone * example.weight, abs=1e-5)
            assert float(summed) == pytest.approx(alone * run.task.num_tokens([example]), abs=1e-4)


def attention(kind: str, implementation: str, folder: Any, **task: Any) -> tuple[Any, Any]:
    run = lm_run(folder(kind), task=task)
    model = load_model(run)
    model.peft.get_base_model().set_attn_implementation(implementation)
    return run, model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_rows_have_the_logits_they_have_alone(folder: Any, kind: str, implementation: str) -> None:
    run, model = attention(kind, implementation, folder, packing=True)
    examples = run.task.encode(lm_rows(9, 2), model.processor)
    packed = run.task.pack(examples)
    assert 1 < len(packed) < len(examples) and run.task.num_rows(packed) == len(examples)
    batch = run.task.collate(packed, model.processor)
    alone = {}
    with torch.no_grad():
        together = run.task.forward(model.peft, batch)
        for example in examples:
            one = run.task.collate([example], model.processor)
            alone[tuple(example.features["input_ids"])] = run.task.forward(model.peft, one)[0]
        leaky = model.peft(input_ids=batch.inputs["input_ids"], use_cache=False).logits
    worst, without_care = 0.0, 0.0
    for row, example in enumerate(packed):
        start = 0
        for length in example.features["lengths"]:
            place = slice(start, start + length)
            expected = alone[tuple(example.features["input_ids"][place])]
            worst = max(worst, float((together[row, place] - expected).abs().max()))
            without_care = max(without_care, float((leaky[row, place] - expected).abs().max()))
            start += length
    assert worst < TOLERANCE
    assert without_care > 1e-2, "the models must be such that a leak would show"


@pytest.mark.parametrize("weighting", ["tokens", "examples"])
def test_packing_changes_no_mean_loss(folder: Any, weighting: str) -> None:
    run, model = attention("llama", "sdpa", folder, packing=True, loss_weighting=weighting)
    examples = run.task.encode(lm_rows(9, 3), model.processor)
    means = []
    with torch.no_grad():
        for each in (examples, run.task.pack(examples)):
            batch = run.task.collate(run.task.weigh(each), model.processor)
            means.append(float(run.task.loss(run.task.forward(model.peft, batch), batch).mean()))
    assert means[0] == pytest.approx(means[1], abs=1e-5)


def test_a_model_that_lets_packed_rows_see_one_another_is_refused(
    folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaky(lengths: Any, width: int) -> Any:
        positions = torch.arange(width).expand(len(lengths), width)
        mask = torch.full((width, width), torch.finfo(torch.float32).min).triu(1)
        return positions, mask.expand(len(lengths), 1, width, width)

    run = lm_run(folder("llama"), task={"packing": True})
    load_model(run)
    monkeypatch.setattr(causal_lm, "apart", leaky)
    with refuses(ModelError, where="task.packing"):
        load_model(run)


def test_a_window_shorter_than_a_packed_row_is_refused(tmp_path: Path) -> None:
    tiny_lm.save(tmp_path, "mistral")
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"sliding_window": 4096', '"sliding_window": 16'))
    with refuses(ModelError, where="task.packing"):
        load_model(lm_run(tmp_path, task={"packing": True}))
    load_model(lm_run(tmp_path))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("packing", [False, True])
def test_stacked_sites_are_sites_alone(folder: Any, kind: str, packing: bool) -> None:
    run = lm_run(folder(kind), task={"packing": packing}, adapter={"r": 4, "lora_dropout": 0.1})
    sites = {name: lm_rows(size, size) for name, size in {"a": 11, "b": 2, "c": 6}.items()}
    initial = load_model(run).initial
    starts = [noisy(initial, seed) for seed in range(len(sites))]
    together = train(run, sites, starts)
    for (name, rows), start, fitted in zip(sites.items(), starts, together, strict=True):
        (alone,) = train(run, {name: rows}, [start])
        assert largest_difference(fitted.adapter, start) > 1e-3, "nothing was trained"
        assert largest_difference(fitted.adapter, alone.adapter) < TOLERANCE, name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_site_is_a_plain_peft_loop(folder: Any, kind: str, plain_peft_loop: Any) -> None:
    run = lm_run(folder(kind))
    rows = lm_rows(8, 4)
    start = noisy(load_model(run).initial, 0)
    (fitted,) = train(run, {"north": rows}, [start])
    assert largest_difference(fitted.adapter, plain_peft_loop(run, rows, start, 1)) < TOLERANCE


def count_passes(run: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Adapter, int]:
    """Train one site; return its adapter and how often the first layer's own modules ran."""
    passes = 0

    def counted(*_: Any) -> None:
        nonlocal passes
        passes += 1

    unwatched = load_model

    def watched(*arguments: Any, **options: Any) -> Any:
        model = unwatched(*arguments, **options)
        layer = next(
            module for name, module in model.peft.named_modules() if name.endswith(("layers.0", "h.0"))
        )
        next(iter(layer.children())).register_forward_hook(counted)
        return model

    monkeypatch.setattr(f"{__name__}.load_model", watched)
    (fitted,) = train(run, {"a": lm_rows(8, 5)})
    monkeypatch.undo()
    return fitted.adapter, passes


@pytest.mark.parametrize(("kind", "dropout"), [("llama", 0.0), ("llama", 0.3), ("gpt2", 0.3)])
def test_gradient_checkpointing_changes_no_gradient(
    folder: Any, kind: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = {"r": 4, "lora_dropout": dropout}
    sgd = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0, "max_steps": 2}
    plain, once = count_passes(lm_run(folder(kind), adapter=adapter, training=sgd), monkeypatch)
    run = lm_run(folder(kind), adapter=adapter, training={**sgd, "gradient_checkpointing": True})
    saved, twice = count_passes(run, monkeypatch)
    assert twice == 2 * once, "every layer must run again in the backward pass"
    # SGD at a rate of 1 moves by the gradient itself.
    assert largest_difference(plain, saved) < 1e-6
    if dropout:
        dry = train(lm_run(folder(kind), training=sgd), {"a": lm_rows(8, 5)})[0].adapter
        assert largest_difference(plain, dry) > 1e-3, "dropout must matter"


def test_an_evaluation_counts_tokens(folder: Any) -> None:
    run = lm_run(folder("qwen2"), task={"packing": True}, training={"per_device_eval_batch_size": 4})
    model = load_model(run)
    rows = lm_rows(9, 6)
    examples = run.task.encode(rows, model.processor)
    losses, right, tokens = 0.0, 0, 0
    with torch.no_grad():
        for example in examples:
            logits = model.peft(input_ids=torch.tensor([example.features["input_ids"]])).logits[0].double()
            for at, label in enumerate(example.target):
                if label != IGNORED:
                    losses -= float(logits[at - 1].log_softmax(0)[label])
                    right += int(logits[at - 1].argmax() == label)
                    tokens += 1
    outcomes = evaluate(AdapterStack.install(model), run, model.initial, examples)
    run.task.check_outcomes(outcomes)
    found = run.task.metrics(outcomes)
    assert (outcomes.rows, outcomes.units) == (len(rows), tokens)
    assert found["loss"] == pytest.approx(losses / tokens, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(losses / tokens), rel=1e-5)
    assert found["token_accuracy"] == right / tokens
    halves = [Outcomes(values=((0,), (1,)), counts=(3, 1), loss_sum=8.0, num_rows=2)] * 2
    assert run.task.metrics(Outcomes.pooled(halves)) == run.task.metrics(halves[0])


def test_prompts_are_continued_as_the_likeliest_tokens_say(folder: Any) -> None:
    run = lm_run(folder("llama"))
    model = load_model(run)
    prompts = ["gout?", "what is a fever?"]
    rows = [Row({"text": prompt}, "here") for prompt in prompts]
    batch = run.task.collate(run.task.encode(rows, model.processor, labelled=False), model.processor)
    with torch.no_grad():
        said = run.task.predictions(run.task.forward(model.peft, batch), batch, model.processor)
        for prompt, answer in zip(prompts, said, strict=True):
            ids = model.processor(prompt + "\n")["input_ids"]
            written: list[int] = []
            while len(written) < run.task.max_new_tokens and 1 not in written:
                logits = model.peft(input_ids=torch.tensor([ids + written]), use_cache=False).logits
                written.append(int(logits[0, -1].argmax()))
            assert answer == {"completion": model.processor.decode(written, skip_special_tokens=True)}


def test_bfloat16_trains_packed_rows(folder: Any) -> None:
    options: dict[str, Any] = {"task": {"packing": True}}
    rows = {"a": lm_rows(8, 7)}
    exact = train(lm_run(folder("llama"), **options), rows)[0].adapter
    coarse = train(lm_run(folder("llama"), **options, training={"bf16": True}), rows)[0].adapter
    assert 0 < largest_difference(exact, coarse) < 0.1


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("QUORATE_WEIGHTS") or not os.environ.get("QUORATE_DATA"),
    reason="QUORATE_WEIGHTS and QUORATE_DATA must name the small weights and the data",
)
def test_a_trained_model_starts_from_its_known_loss_and_learns() -> None:
    weights = Path(os.environ["QUORATE_WEIGHTS"]) / "stories260k-llama"
    file = Path(os.environ["QUORATE_DATA"]) / "medquad_sft" / "validation.jsonl"
    rows = [Row(json.loads(line), f"{file}:{at}") for at, line in enumerate(file.read_text().splitlines(), 1)]
    run = lm_run(
        weights,
        task={"max_length": 320},
        adapter={"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        training={"max_steps": 15, "learning_rate": 5e-3, "per_device_train_batch_size": 4},
    )
    model = load_model(run)
    held_out = run.task.encode(rows[:30], model.processor)
    examples = run.task.weigh(run.task.encode(rows[30:], model.processor))
    stack = AdapterStack.install(model)
    before = run.task.metrics(evaluate(stack, run, model.initial, held_out))["loss"]
    task = SiteTask("a", examples, model.initial)
    (fitted,) = fit(stack, run, 1, [task], frozenset(model.initial), ignore_step)
    after = run.task.metrics(evaluate(stack, run, fitted.adapter, held_out))["loss"]
    assert before == pytest.approx(4.06, abs=0.2)
    assert after < before - 0.5
