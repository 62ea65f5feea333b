"""Rows that mix by the length of their batch: seen at every site, padded to one length where that helps."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import mixing_models
import pytest
import tiny_lm
import torch
from engines import answer_all
from row_gradients import noisy

from quorate.client.site.site import Site
from quorate.client.trainer import passes
from quorate.client.trainer.dp.dp_sgd import fit_privately
from quorate.client.trainer.dp.row_isolation import check_rows_apart, row_gradients, summed_gradient
from quorate.client.trainer.passes import SiteTask, training_mode
from quorate.client.trainer.stack import AdapterStack
from quorate.server.exchange.join import request
from quorate.server.rounds.run import Run
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ModelError
from quorate.shared.model.lora_model import load_model
from quorate.shared.progress import ignore_step
from quorate.shared.tasks.task import Row

PRIVACY = {"unit": "record", "noise_multiplier": 1.0}
WORDS = ("fever", "cough", "pain", "dose", "scan", "heart", "liver", "lung", "blood")


def texts(*lengths: int) -> list[Row]:
    draw = random.Random(7)
    return [
        Row({"text": " ".join(draw.choices(WORDS, k=length)), "label": at % 3}, f"rows.csv:{at + 2}")
        for at, length in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def fnet(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixing_models.save_fnet(tmp_path_factory.mktemp("fnet"), tiny_bert)


@pytest.fixture(scope="module")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixing_models.save_longrope(tmp_path_factory.mktemp("phi3"), switches_at=32)


@pytest.fixture
def case(make_run: Any, fnet: Path, longrope: Path) -> Any:
    """A run over a model that mixes, and rows of which the first two are of one length."""

    def build(name: str) -> tuple[RunConfig, list[Row]]:
        every = {"target_modules": "all-linear"}
        if name == "fnet":
            model = {"model_name_or_path": str(fnet)}
            return make_run(model=model, adapter=every, privacy=PRIVACY), texts(3, 3, 9, 5)
        words = {"prompt": "what is fever?", "completion": "fever"}
        return (
            tiny_lm.lm_run(longrope, adapter=every, task={"loss_weighting": "examples"}, privacy=PRIVACY),
            [Row(words, f"rows.jsonl:{at + 1}") for at in range(3)],
        )

    return build


def installed(run: RunConfig, rows: list[Row]) -> tuple[Any, AdapterStack, list[Any]]:
    model = load_model(run)
    return model, AdapterStack.install(model), run.task.encode(rows, model.processor)


@pytest.mark.parametrize(("name", "least"), [("fnet", 0.05), ("longrope", 1e-3)])
def test_a_longer_row_changes_the_others_and_padding_keeps_them_apart(
    case: Any, name: str, least: float, caplog: pytest.LogCaptureFixture
) -> None:
    """The model mixes, by as little as is asked for; the site sees that and pads all rows to max_length."""
    run, rows = case(name)
    model, stack, examples = installed(run, rows)
    longest = run.task.longest(examples[0])
    assert run.task.length(longest) == run.task.max_length
    with caplog.at_level(logging.WARNING):
        length = check_rows_apart(stack, run, "north", examples)
    assert length == run.task.max_length == stack.rows_apart["north"].length
    assert "north" in caplog.text
    stack.load([noisy(model.initial, 1)], model.initial)
    with training_mode(stack, run, seed=0):
        for padded, mixed in ((None, True), (length, False)):
            alone = summed_gradient(stack, run, examples[:1], padded)
            both = row_gradients(stack, run, [longest, examples[0]], padded)
            norm = torch.stack([each.norm() for each in alone.values()]).norm()
            moved = torch.stack([(both[name][1] - alone[name]).norm() for name in alone]).norm() / norm
            assert moved > least if mixed else moved < 1e-5


@pytest.mark.parametrize("name", ["fnet", "longrope"])
def test_private_training_pads_every_batch(case: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, rows = case(name)
    model, stack, examples = installed(run, rows)
    check_rows_apart(stack, run, "north", examples)
    seen: list[int] = []
    right = passes._logits

    def spy(model: Any, run: Any, batch: Any) -> Any:
        seen.append(batch.inputs["input_ids"].shape[1])
        return right(model, run, batch)

    monkeypatch.setattr(passes, "_logits", spy)
    task = SiteTask("north", examples, model.initial)
    fit_privately(stack, run, 1, [task], frozenset(model.initial), ignore_step)
    assert set(seen) == {run.task.max_length}


def test_every_site_and_every_set_of_rows_is_tried(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(privacy=PRIVACY)
    model, stack, examples = installed(run, texts(3, 4, 9, 5))
    tried: list[list[int]] = []
    from quorate.client.trainer.dp import row_isolation

    right = row_isolation._distance

    def spy(stack: Any, run: Any, rows: Any, *more: Any) -> float:
        tried.append([run.task.length(row) for row in rows])
        return right(stack, run, rows, *more)

    monkeypatch.setattr(row_isolation, "_distance", spy)
    for site, rows in (("a", examples), ("a", examples), ("b", examples[:2]), ("a", examples[1:])):
        assert check_rows_apart(stack, run, site, rows) is None
    assert tried == [[5, 11, 24], [5, 6, 24], [6, 11, 24]], "shortest, longest and full; each rows once"
    tasks = [SiteTask(name, examples, model.initial) for name in ("a", "c")]
    fit_privately(stack, run, 1, tasks, frozenset(model.initial), ignore_step)
    assert stack.rows_apart.keys() == {"a", "b", "c"}, "not the first site of a stack alone"


@pytest.mark.parametrize("first", [0, 1])
def test_what_padding_does_not_mend_is_refused_in_either_order(
    make_run: Any, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """A loss to which the first (or last) row of a batch adds a hundredth, whatever its length."""
    from quorate.shared.tasks import SequenceClassification

    right = SequenceClassification.loss

    def leaks(self: Any, logits: Any, batch: Any) -> Any:
        each = right(self, logits, batch)
        share = torch.zeros_like(each)
        share[first - 1] = 0.009 * (len(each) > 1)
        return each * (1 + share)

    monkeypatch.setattr(SequenceClassification, "loss", leaks)
    run = make_run(privacy=PRIVACY)
    _, stack, examples = installed(run, texts(3, 4, 9, 5))
    with pytest.raises(ModelError) as caught:
        check_rows_apart(stack, run, "a", examples)
    assert caught.value.code == "model" and not stack.rows_apart


def test_a_site_joins_and_trains_with_such_a_model(case: Any, tmp_path: Path) -> None:
    run, rows = case("fnet")
    site = Site({"north": {"train": rows, "validation": rows[:1], "test": rows[:1]}})
    opened = Run(site.prepare(run), tmp_path, "0" * 16)
    (joined,) = answer_all(site, [request(opened, 0, "join", "north")])
    assert joined.header.error is None
    (fitted,) = answer_all(site, [request(opened, 1, "fit", "north", joined.arrays)])
    assert fitted.header.error is None and fitted.header.num_steps == 3


@pytest.mark.parametrize("kind", ["text", "words", "tokens"])
def test_an_example_of_the_longest_size_keeps_its_ends_and_its_target(
    make_run: Any, tmp_path: Path, kind: str
) -> None:
    if kind == "tokens":
        folder = tiny_lm.save(tmp_path / "m", "llama")
        run = tiny_lm.lm_run(folder)
        model = load_model(run)
        (example,) = run.task.encode(tiny_lm.lm_rows(1, 0), model.processor)
    else:
        task = {"name": "token_classification", "labels": ["O", "B-organ"], "max_length": 24}
        run = make_run() if kind == "text" else make_run(task=task)
        model = load_model(run)
        row = Row({"tokens": ["heart", "pain"], "ner_tags": [1, 0]}, "r:1")
        (example,) = run.task.encode(texts(4) if kind == "text" else [row], model.processor)
    long = run.task.longest(example)
    assert run.task.length(long) == run.task.max_length > run.task.length(example)
    ids, longer = example.features["input_ids"], long.features["input_ids"]
    assert longer[: len(ids) - 1] == list(ids[:-1]) and longer[-1] == ids[-1]
    for length in (None, run.task.max_length):
        batch = run.task.collate([example, long], model.processor, length)
        assert batch.inputs["input_ids"].shape == (2, run.task.max_length)
        assert batch.inputs["attention_mask"].sum(dim=1).tolist() == [len(ids), run.task.max_length]
    alone = run.task.collate([example], model.processor, run.task.max_length)
    with torch.no_grad():
        padded = run.task.loss(run.task.forward(model.peft, alone), alone)
        natural = run.task.collate([example], model.processor)
        assert float(padded) == pytest.approx(
            float(run.task.loss(run.task.forward(model.peft, natural), natural)), abs=1e-5
        )
