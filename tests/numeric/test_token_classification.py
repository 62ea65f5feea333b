"""Token classification against seqeval and torch; words, pieces and what is cut off."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from seqeval import metrics as reference
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from quorate.client.data.splits import load_splits
from quorate.client.models.predictions import predict
from quorate.client.site.site import Site
from quorate.client.trainer.fit import SiteTask, fit
from quorate.client.trainer.stack import AdapterStack
from quorate.deploy.commands.both.predict import _print_table as print_table
from quorate.server.results.outputs import measure, write_outputs
from quorate.server.rounds.loop import run_rounds
from quorate.server.rounds.run import Run
from quorate.shared.config.sites_config import SourceConfig
from quorate.shared.errors import DataError, ProtocolError
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.model.lora_model import load_model
from quorate.shared.progress import ignore_step
from quorate.shared.tasks import TokenClassification
from quorate.shared.tasks.task import Batch, Row
from quorate.shared.tasks.text.words import CUT, NO_PIECE, Words, split_text
from quorate.shared.tasks.token_classification import IGNORED
from quorate.simulations.in_process_grid import InProcessGrid

BIO = ("O", "B-drug", "I-drug", "B-disease", "I-disease")
IOBES = ("B-a", "I-a", "E-a", "S-a", "O", "S-b-c", "E-b-c", "B-b-c", "I-b-c")
ORGANS = {"name": "token_classification", "labels": ["O", "B-organ", "I-organ"], "max_length": 24}


def task(labels: tuple[str, ...] = BIO, **options: Any) -> TokenClassification:
    return TokenClassification(name="token_classification", labels=labels, **options)


def outcomes_of(which: TokenClassification, truth: list[list[int]], said: list[list[int]]) -> Outcomes:
    """What a site would send if the model said `said`: every word is one piece, behind one special token."""
    length = 1 + max(map(len, truth))
    logits = torch.zeros(len(truth), length, len(which.labels))
    for row, tags in enumerate(said):
        for word, tag in enumerate(tags):
            logits[row, 1 + word, tag] = 1.0
    words = [Words(tuple(tags), tuple(range(1, 1 + len(tags)))) for tags in truth]
    batch = Batch({}, {"words": words}, torch.ones(len(truth)))
    return Outcomes.of_rows(which.outcomes(logits, batch), 0.5 * len(truth), len(truth))


@pytest.mark.parametrize("labels", [BIO, IOBES])
def test_metrics_over_sites_are_those_of_seqeval(labels: tuple[str, ...]) -> None:
    """1,000 sentences with any tags at all, also such as no scheme allows, over three sites."""
    draw = random.Random(0)
    truth = [
        [draw.randrange(len(labels)) if draw.random() < 0.6 else labels.index("O") for _ in range(size)]
        for size in (draw.randint(1, 20) for _ in range(1000))
    ]
    said = [[t if draw.random() < 0.8 else draw.randrange(len(labels)) for t in tags] for tags in truth]
    which = task(labels)
    parts = [(0, 100), (100, 101), (101, 1000)]
    pooled = Outcomes.pooled([outcomes_of(which, truth[a:b], said[a:b]) for a, b in parts])
    assert pooled == outcomes_of(which, truth, said)
    assert pooled.rows == 1000
    ours = which.metrics(pooled)
    names, answers = [[[labels[tag] for tag in tags] for tags in side] for side in (truth, said)]
    for metric in ("precision", "recall", "f1"):
        theirs = getattr(reference, f"{metric}_score")(names, answers)
        assert 0.2 < theirs < 0.9, "neither nothing nor everything is right"
        assert ours[metric] == pytest.approx(theirs)
    assert ours["macro_f1"] == pytest.approx(reference.f1_score(names, answers, average="macro"))
    assert ours["loss"] == pytest.approx(0.5)
    report = reference.classification_report(names, answers, output_dict=True)
    for kind in which.types:
        theirs = [report[kind][key] for key in ("precision", "recall", "f1-score", "support")]
        assert list(ours["per_class"][kind].values()) == pytest.approx(theirs)


def test_rates_of_nothing_are_nothing() -> None:
    which = task()
    assert which.metrics(Outcomes()) == {}
    nothing = which.metrics(outcomes_of(which, [[0, 0]], [[0, 0]]))
    assert [nothing[each] for each in which.metrics_for_best_model] == [0.0] * 4
    # A type that is in neither truth nor answers does not enter the macro average.
    assert which.metrics(outcomes_of(which, [[1, 2, 0]], [[1, 2, 0]]))["macro_f1"] == 1.0
    scalars = {name for name, value in nothing.items() if isinstance(value, float)}
    assert scalars == {*which.metrics_for_best_model, "loss"} and which.default_metric in scalars


def test_outcomes_of_another_task_are_refused() -> None:
    for value in ((2, 0), (-1, 0), (0, 3), (0, -1), (0,), (0, 0, 0)):
        with pytest.raises(ProtocolError):
            task().check_outcomes(Outcomes(values=(value,), counts=(1,)))
    sums = {"0x0": 1.0, "5x5": 1.0}
    task().check_outcomes(Outcomes(values=((0, 0), (1, 2)), counts=(1, 1), sums=sums))


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (("O", "B-a", "B-a"), "'B-a'"),
        (("B-a", "I-a"), "'O'"),
        (("O", "drug"), "'drug'"),
        (("O", "L-a"), "'L-a'"),
        (("O", "B-"), "'B-'"),
    ],
)
def test_labels_that_are_no_tags_are_refused(labels: tuple[str, ...], named: str) -> None:
    with pytest.raises(ValidationError) as caught:
        task(labels)
    (error,) = caught.value.errors()
    assert error["loc"] == ("labels",) and f"label {named} " in error["msg"]


def sentence(words: list[str], tags: list[int], line: int = 1) -> Row:
    return Row({"tokens": words, "ner_tags": tags}, f"notes.jsonl:{line}")


def test_the_first_piece_of_a_word_carries_its_tag(make_run: Any) -> None:
    run = make_run(task=ORGANS)
    model = load_model(run)
    # The tiny tokenizer makes three pieces of heart-rash, and none of a control character.
    rows = [sentence(["pain", "heart-rash", "\x01", "dose"], [0, 1, 2, 0]), sentence(["liver"], [1])]
    examples = run.task.encode(rows, model.processor)
    assert examples[0].target.places == (1, 2, NO_PIECE, 5)
    batch = run.task.collate(examples, model.processor)
    none = IGNORED
    assert batch.targets["pieces"].tolist() == [[none, 0, 1, none, none, 0, none], [none, 1, *[none] * 5]]
    assert run.task.notes(rows, examples) == ("1 of 5 words are nothing to the tokenizer; they count as O",)
    said = torch.zeros(2, 7, 3)
    said[0, 2, 1] = said[1, 1, 1] = 1.0  # B-organ where it belongs
    # The dropped word ends the first entity a word too early: one wrong, one missed; the other is right.
    assert sorted(run.task.outcomes(said, batch).tolist()) == [[0, 0], [0, 1], [0, 2]]

    model.processor.padding_side = "left"
    left = run.task.collate(examples, model.processor)
    for row, example in enumerate(examples):
        for place, word in zip(left.targets["words"][row].places, example.target.places, strict=True):
            assert place == word == NO_PIECE or (
                left.inputs["input_ids"][row, place] == example.features["input_ids"][word]
            )
    assert left.targets["words"][1].places == (6 - 1,)


def test_what_is_cut_off_counts_as_missed(make_run: Any) -> None:
    run = make_run(task={**ORGANS, "max_length": 5})  # three words between the special tokens
    model = load_model(run)
    rows = [
        sentence(["heart", "pain", "lung", "liver", "dose", "heart"], [1, 0, 1, 2, 0, 1]),
        sentence(["lung"], [1]),
    ]
    examples = run.task.encode(rows, model.processor)
    assert examples[0].target.places == (1, 2, 3, CUT, CUT, CUT)
    assert run.task.notes(rows, examples) == (
        "3 of 7 words, in 1 of 2 training rows, lie beyond max_length 5: the model does not see them, "
        "entities there count as missed",
    )
    batch = run.task.collate(examples, model.processor)
    perfect = functional.one_hot(batch.targets["pieces"].clamp(min=0), 3).float()
    found = run.task.metrics(Outcomes.of_rows(run.task.outcomes(perfect, batch), 0.0, 2))
    # Of four entities two are whole; of `lung liver` the model sees the first word: one wrong, one missed.
    assert (found["precision"], found["recall"]) == (pytest.approx(2 / 3), pytest.approx(2 / 4))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["pain", "dose"], "ner_tags": ["O"]}, "2 tokens but 1 ner_tags; give one tag for each"),
        ({"tokens": [], "ner_tags": []}, "the row has no words"),
        ({"tokens": ["pain"], "ner_tags": ["B-bone"]}, "label 'B-bone' is not among the run's labels"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(
    tmp_path: Path, make_run: Any, row: dict[str, Any], message: str
) -> None:
    path = tmp_path / "train.jsonl"
    good = {"tokens": ["heart", "pain"], "ner_tags": ["B-organ", 0]}
    path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    which = make_run(task=ORGANS).task
    with pytest.raises(DataError) as caught:
        source = SourceConfig(source=str(path), split={"validation": 0, "test": 0})
        which.encode(load_splits(source, tmp_path, which.columns, which.labels)["train"], None)
    assert str(caught.value).startswith(f"{path}:2: ") and message in str(caught.value)
    assert "pain" not in str(caught.value)


def sentences(count: int, seed: int) -> list[Row]:
    """Of one to 15 words, in which heart, liver and lung are organs; `blood heart` is one of two words."""
    draw = random.Random(seed)
    plain = ("fever", "cough", "pain", "dose", "scan", "drug", "trial", "cell")
    rows = []
    for index in range(count):
        words: list[str] = []
        tags: list[int] = []
        for _ in range(draw.randint(1, 8)):
            kind = draw.random()
            new = ["blood", "heart"] if kind < 0.2 else [draw.choice(("heart", "liver", "lung"))]
            new = new if kind < 0.4 else [draw.choice(plain)]
            words += new
            tags += [1, 2][: len(new)] if kind < 0.4 else [0]
        rows.append(sentence(words, tags, index + 1))
    return rows


@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_losses_are_torchs_own_and_each_rows_own(make_run: Any, weights: str) -> None:
    run = make_run(task={**ORGANS, "class_weights": weights})
    model = load_model(run)
    examples = run.task.weigh(run.task.encode(sentences(12, 0), model.processor))
    batch = run.task.collate(examples, model.processor)
    assert len(set(map(run.task.length, examples))) > 4, "padding must happen"
    tags = torch.tensor([tag for example in examples for tag in example.target.tags])
    each_tag = torch.ones(3)
    if weights == "balanced":
        each_tag = len(tags) / (3 * torch.bincount(tags, minlength=3).float())
        assert each_tag[tags].mean() == pytest.approx(1.0, abs=1e-5), "weights change no step size"
    with torch.no_grad():
        together = run.task.loss(model.peft(**batch.inputs).logits, batch)
        for row, example in enumerate(examples):
            alone = run.task.collate([example], model.processor)
            logits = model.peft(**alone.inputs).logits
            assert float(run.task.loss(logits, alone)[0]) == pytest.approx(float(together[row]), abs=1e-5)
            words = torch.tensor(example.target.tags)
            theirs = functional.cross_entropy(logits[0, 1:-1], words, reduction="none") * each_tag[words]
            assert float(theirs.mean()) == pytest.approx(float(together[row]), abs=1e-5)
    assert run.task.loss(torch.zeros(12, *batch.targets["pieces"].shape[1:], 3).bfloat16(), batch).dtype == (
        torch.float32
    )


def test_a_row_whose_words_are_all_nothing_to_the_tokenizer_has_no_loss(make_run: Any) -> None:
    run = make_run(task=ORGANS)
    model = load_model(run)
    batch = run.task.collate(run.task.encode([sentence(["\x01"], [1])], model.processor), model.processor)
    assert run.task.loss(model.peft(**batch.inputs).logits, batch).tolist() == [0.0]


def test_stacked_sites_are_sites_alone(make_run: Any) -> None:
    run = make_run(
        task={**ORGANS, "class_weights": "balanced", "token_dropout": 0.1},
        adapter={"lora_dropout": 0.1, "target_modules": "all-linear"},
        training={"max_steps": None, "num_train_epochs": 2, "optim": "sgd", "learning_rate": 0.05},
    )
    sites = {
        name: sentences(size, seed) for seed, (name, size) in enumerate({"a": 13, "b": 3, "c": 8}.items())
    }

    def train(names: list[str]) -> list[Any]:
        model = load_model(run)
        stack = AdapterStack.install(model)
        parts = [
            SiteTask(name, run.task.weigh(run.task.encode(sites[name], model.processor)), model.initial)
            for name in names
        ]
        return fit(stack, run, 1, parts, frozenset(model.initial), ignore_step)

    start = load_model(run).initial
    for name, together in zip(sites, train(list(sites)), strict=True):
        (alone,) = train([name])
        assert max(float(np.abs(alone.adapter[key] - start[key]).max()) for key in start) > 1e-3
        for key in start:
            np.testing.assert_allclose(together.adapter[key], alone.adapter[key], atol=1e-5, rtol=0)


def test_texts_are_split_and_spans_point_into_them() -> None:
    text = "  Type-2 diabetes (T2D),\té."
    tokens, words = split_text(text)
    assert tokens == ["Type", "-", "2", "diabetes", "(", "T2D", ")", ",", "é", "."]
    assert [text[start:end] for start, end in words.spans] == tokens


def test_byte_level_tokenizers_see_a_space_before_each_word() -> None:
    """RoBERTa's kind: `the` after a space and at the start of a text are different pieces."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        vocab_size=300,
        show_progress=False,
    )
    backend.train_from_iterator(["x the heart and the liver"] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", model_max_length=64)
    words = ["the", "liver"]
    before = tokenizer(words, is_split_into_words=True)["input_ids"]
    inside = tokenizer("x the liver")["input_ids"][1:]
    assert before != inside
    base = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=64))
    which = task(max_length=64)
    ready = which.prepare_processor(tokenizer, base, None, "bytes")
    assert ready(words, is_split_into_words=True)["input_ids"] == inside
    (example,) = which.encode([sentence(words, [0, 1])], ready)
    second = len(ready("the")["input_ids"])
    assert example.target.places == (0, second)
    texts = [Row({"text": text}, "text") for text in ("", "the liver")]
    assert [each.target.places for each in which.encode(texts, ready, labelled=False)] == [(), (0, second)]


def test_entities_are_learnt_and_predicted_end_to_end(
    make_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {"train": 40, "validation": 15, "test": 15}
    sites = {
        name: {split: sentences(size, seed + index) for index, (split, size) in enumerate(parts.items())}
        for name, seed in (("north", 0), ("south", 10))
    }
    site = Site(sites)
    config = make_run(
        task=ORGANS,
        adapter={"target_modules": "all-linear"},
        federation={"rounds": 3},
        training={"max_steps": 20, "per_device_train_batch_size": 8},
    )
    run = Run.open(site.prepare(config), tmp_path / "out")
    result = run_rounds(InProcessGrid(site, site.names), run)
    assert result.progress is not None and result.progress.best_value is not None
    assert run.metric == "f1" and result.progress.best_value > 0.7

    _, best, _ = measure(InProcessGrid(site, site.names), run, result)
    write_outputs(run, result, best, best)
    rows = [row for splits in sites.values() for row in splits["test"]]
    texts = [" ".join(row.values["tokens"]) for row in rows]
    answers = predict(run.output_dir / "adapter", texts)
    # What is predicted from texts alone is what was measured: the same entities, hence the same rates.
    said, truth = set(), set()
    for index, (row, text, answer) in enumerate(zip(rows, texts, answers, strict=True)):
        assert answer["words_cut"] == 0
        for each in answer["entities"]:
            assert text[each["start"] : each["end"]] == each["text"] and 1 / 3 < each["score"] <= 1
            said.add((index, each["type"], each["text"], text[: each["start"]].count(" ")))
        words = row.values["tokens"]
        for _, begin, end in run.config.task.entities(row.values["ner_tags"]):
            truth.add((index, "organ", " ".join(words[begin:end]), begin))
    assert best is not None and best.test is not None
    assert best.test.pooled["precision"] == pytest.approx(len(said & truth) / len(said))
    assert best.test.pooled["recall"] == pytest.approx(len(said & truth) / len(truth))
    print_table([{"text": text, **answer} for text, answer in zip(texts, answers, strict=True)])
    shown = capsys.readouterr().out
    assert all(f"{entity} (organ)" in shown for _, _, entity, _ in said) and "not read" not in shown
    (long,) = predict(run.output_dir / "adapter", ["cell " * 30])
    print_table([{"text": "cells", **long}])
    assert "(the last 8 words are beyond max_length: not read)" in capsys.readouterr().out
    assert long["words_cut"] == 30 - 22, "22 words fit beside the two special tokens"
    page = (run.output_dir / "report.html").read_text()
    assert "Per entity type" in page and "Entities" in page and "over all entities" in page
    card = (run.output_dir / "adapter" / "README.md").read_text()
    assert "pipeline_tag: token-classification" in card and "AutoModelForTokenClassification" in card
