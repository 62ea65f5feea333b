"""Sequence classification against scikit-learn and torch, and the identities its losses must keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pydantic import ValidationError
from refusals import refuses
from sklearn import metrics as reference
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional

from quorate.client.site.site import Site
from quorate.server.rounds.loop import run_rounds
from quorate.server.rounds.run import Run
from quorate.shared.errors import DataError, ProtocolError
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.model.lora_model import load_model
from quorate.shared.tasks import SequenceClassification
from quorate.shared.tasks.task import Batch, Row
from quorate.simulations.in_process_grid import InProcessGrid

CLASSES = 4
NAMES = tuple(f"label-{index}" for index in range(CLASSES))


def task(**options: Any) -> SequenceClassification:
    return SequenceClassification(name="sequence_classification", labels=NAMES, **options)


def multi(**options: Any) -> SequenceClassification:
    return task(problem_type="multi_label_classification", **options)


ids = arrays.arrays(np.int64, st.tuples(st.integers(1, 60), st.just(2)), elements=st.integers(0, CLASSES - 1))
bits = arrays.arrays(
    np.int64, st.tuples(st.integers(1, 40), st.just(2 * CLASSES)), elements=st.integers(0, 1)
)


@given(ids, st.floats(0, 100))
def test_single_label_metrics_are_those_of_scikit_learn(rows: Any, loss: float) -> None:
    truth, guess = rows.T
    ours = task().metrics(Outcomes.of_rows(rows, loss))
    assert ours["accuracy"] == pytest.approx(reference.accuracy_score(truth, guess))
    present = sorted(set(truth))
    theirs = reference.f1_score(truth, guess, labels=present, average="macro", zero_division=0)
    assert ours["macro_f1"] == pytest.approx(theirs)
    assert ours["confusion"] == reference.confusion_matrix(truth, guess, labels=range(CLASSES)).tolist()
    assert ours["loss"] == pytest.approx(loss / len(rows))
    each = reference.precision_recall_fscore_support(truth, guess, labels=range(CLASSES), zero_division=0)
    for index, name in enumerate(NAMES):
        found = [ours["per_class"][name][key] for key in ("precision", "recall", "f1", "support")]
        assert found == pytest.approx([column[index] for column in each])


@given(bits)
def test_multi_label_metrics_are_those_of_scikit_learn(rows: Any) -> None:
    truth, guess = rows[:, :CLASSES], rows[:, CLASSES:]
    ours = multi().metrics(Outcomes.of_rows(rows, 1.0))
    assert ours["exact_match"] == pytest.approx(reference.accuracy_score(truth, guess))
    assert ours["micro_f1"] == pytest.approx(
        reference.f1_score(truth, guess, average="micro", zero_division=0)
    )
    present = np.flatnonzero((truth | guess).any(axis=0))
    each = reference.f1_score(truth, guess, average=None, zero_division=0)
    assert ours["macro_f1"] == pytest.approx(each[present].mean() if len(present) else 0.0)
    theirs = reference.precision_recall_fscore_support(truth, guess, zero_division=0)
    for index, name in enumerate(NAMES):
        found = [ours["per_class"][name][key] for key in ("precision", "recall", "f1", "support")]
        assert found == pytest.approx([column[index] for column in theirs])


@pytest.mark.parametrize("which", [task(), multi()])
def test_metrics_that_pick_the_best_round_are_top_level_rates(which: SequenceClassification) -> None:
    width = 2 * CLASSES if which.multi_label else 2
    found = which.metrics(Outcomes.of_rows(np.ones((3, width), np.int64), 0.5))
    assert which.default_metric in which.metrics_for_best_model
    assert {name for name, value in found.items() if isinstance(value, float)} == {
        *which.metrics_for_best_model,
        "loss",
    }
    assert all(found[name] == 1.0 for name in which.metrics_for_best_model), "perfect is the most there is"


def test_no_rows_have_no_metrics() -> None:
    assert task().metrics(Outcomes()) == {}


def test_outcomes_of_another_task_are_refused() -> None:
    for which, value in (
        (task(), (0, CLASSES)),
        (task(), (-1, 0)),
        (task(), (0, 0, 0)),
        (multi(), (0, 1)),
        (multi(), (0,) * (2 * CLASSES - 1) + (2,)),
    ):
        with refuses(ProtocolError, "not-labels"):
            which.check_outcomes(Outcomes(values=(value,), counts=(1,)))
    task().check_outcomes(Outcomes(values=((0, CLASSES - 1),), counts=(1,)))
    multi().check_outcomes(Outcomes(values=((1,) * 2 * CLASSES,), counts=(1,)))


finite = st.floats(-30, 30, width=32)
logits_of = st.integers(1, 6).flatmap(
    lambda rows: st.tuples(
        arrays.arrays(np.float32, (rows, CLASSES), elements=finite),
        arrays.arrays(np.int64, rows, elements=st.integers(0, CLASSES - 1)),
        arrays.arrays(np.float32, (rows, CLASSES), elements=st.integers(0, 1)),
        arrays.arrays(np.float32, (rows, CLASSES), elements=st.floats(0, 5, width=32)),
    )
)


@given(logits_of)
def test_losses_are_torchs_own_and_each_rows_own(drawn: Any) -> None:
    logits, target, truth, weights = map(torch.from_numpy, drawn)
    single = task().loss(logits, Batch({}, target, weights[:, 0]))
    each = functional.cross_entropy(logits, target, reduction="none") * weights[:, 0]
    torch.testing.assert_close(single, each)
    several = multi().loss(logits, Batch({}, truth, weights))
    theirs = functional.binary_cross_entropy_with_logits(logits, truth, weight=weights, reduction="none")
    torch.testing.assert_close(several, theirs.mean(dim=1))
    for row in range(len(logits)):
        alone = Batch({}, target[row : row + 1], weights[row : row + 1, 0])
        torch.testing.assert_close(single[row : row + 1], task().loss(logits[row : row + 1], alone))
        alone = Batch({}, truth[row : row + 1], weights[row : row + 1])
        torch.testing.assert_close(several[row : row + 1], multi().loss(logits[row : row + 1], alone))


def test_losses_and_outcomes_are_in_float32_and_of_the_logits_sign() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.0, 3.0], [0.1, 0.2, -0.3, -4.0]])
    batch = Batch({}, torch.tensor([3, 0]), torch.ones(2))
    assert task().loss(logits.bfloat16(), batch).dtype == torch.float32
    assert task().outcomes(logits, batch).tolist() == [[3, 3], [0, 1]]
    truth = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
    several = Batch({}, truth, torch.ones(2))
    assert multi().outcomes(logits, several).tolist() == [
        [1, 0, 0, 1, 1, 0, 0, 1],
        [0, 1, 0, 0, 1, 1, 0, 0],
    ]


def rows_of(labels: list[Any]) -> list[Row]:
    return [Row({"text": "fever", "label": label}, f"notes.csv:{i + 2}") for i, label in enumerate(labels)]


@given(st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=40))
def test_balanced_weights_are_those_of_scikit_learn(labels: list[int]) -> None:
    weighed = task(class_weights="balanced").weigh(examples_of(labels))
    present = np.unique(labels)
    theirs = dict(zip(present, compute_class_weight("balanced", classes=present, y=labels), strict=True))
    assert [e.weight for e in weighed] == pytest.approx([theirs[label] for label in labels])
    assert np.mean([e.weight for e in weighed]) == pytest.approx(1.0), "a missing label changes no step size"


def examples_of(labels: list[Any]) -> list[Any]:
    """Encode without a tokenizer's help: only labels matter here."""
    which = multi() if isinstance(labels[0], list) else task()
    return which.encode(rows_of(labels), lambda texts, **_: {"input_ids": [[1]] * len(texts)})


def test_balanced_weights_of_several_labels_weigh_presence_against_absence() -> None:
    examples = examples_of([[0], [0, 1], [], [0]])
    weighed = multi(class_weights="balanced").weigh(examples)
    assert weighed[1].weight == pytest.approx((1 / 3, 3.0, 1.0, 1.0))
    for label in (0, 1):  # presence and absence then weigh the same in sum
        pairs = [(e.target[label], e.weight[label]) for e in weighed]
        assert sum(w for t, w in pairs if t) == pytest.approx(sum(w for t, w in pairs if not t))
    # torch calls this weight pos_weight
    logits = torch.randn(4, CLASSES, generator=torch.Generator().manual_seed(0))
    truth, weights = torch.tensor([e.target for e in weighed]), torch.tensor([e.weight for e in weighed])
    counts = truth.sum(dim=0)
    theirs = functional.binary_cross_entropy_with_logits(
        logits, truth, pos_weight=(4 - counts) / counts.clamp(min=1), reduction="none"
    ).mean(dim=1)
    torch.testing.assert_close(multi().loss(logits, Batch({}, truth, weights)), theirs)


def test_listed_weights_go_by_label() -> None:
    listed = (0.5, 1.0, 2.0, 0.0)
    weighed = task(class_weights=listed).weigh(examples_of([3, 2, 0]))
    assert [e.weight for e in weighed] == [0.0, 2.0, 0.5]
    several = multi(class_weights=listed).weigh(examples_of([[0, 2], []]))
    assert [e.weight for e in several] == [(0.5, 1.0, 2.0, 1.0), (1.0, 1.0, 1.0, 1.0)]
    with pytest.raises(ValidationError) as caught:
        task(class_weights=(1.0, 1.0, 1.0))
    said = caught.value.errors()[0]["msg"]
    assert "class_weights" in said and "3 " in said and "4 " in said


@pytest.mark.parametrize(
    ("which", "label"),
    [(task(), 4), (task(), -1), (task(), None), (task(), [1]), (multi(), 1), (multi(), [0, 9])],
)
def test_an_impossible_label_is_named_by_its_row(which: SequenceClassification, label: Any) -> None:
    good: Any = [1] if which.multi_label else 1
    with refuses(DataError, where="notes.csv:3"):
        which.encode(rows_of([good, label]), None)


def test_labels_are_counted_and_not_read_where_there_are_none() -> None:
    assert list(task().label_counts(examples_of([1, 1, 3])).values()) == [0, 2, 0, 1]
    assert list(multi().label_counts(examples_of([[0, 1], [1]])).values()) == [1, 2, 0, 0]
    unread = task().encode(rows_of(["?"]), lambda texts, **_: {"input_ids": [[1]]}, labelled=False)
    assert unread[0].target == 0


def test_padding_and_neighbours_change_no_row(make_run: Any, make_sites: Any) -> None:
    run = make_run()
    model = load_model(run)
    rows = sorted(make_sites(a=12)["a"]["train"], key=lambda row: len(row.values["text"]))
    examples = run.task.encode(rows, model.processor)
    assert run.task.length(examples[0]) + 5 < run.task.length(examples[-1]), "padding must happen"
    batch = run.task.collate(examples, model.processor)
    with torch.no_grad():
        together = run.task.loss(model.peft(**batch.inputs).logits, batch)
        for index, example in enumerate(examples):
            alone = run.task.collate([example], model.processor)
            loss = run.task.loss(model.peft(**alone.inputs).logits, alone)
            assert float(loss[0]) == pytest.approx(float(together[index]), abs=1e-5)


def test_long_texts_are_cut(make_run: Any, make_sites: Any) -> None:
    run = make_run(task={"max_length": 5})
    examples = run.task.encode(make_sites(a=9)["a"]["train"], load_model(run).processor)
    assert max(map(run.task.length, examples)) == 5


@settings(max_examples=20)
@given(arrays.arrays(np.float32, (2, CLASSES), elements=finite))
def test_predictions_name_labels_with_their_probability(logits: Any) -> None:
    for row, said in zip(logits, task().predictions(torch.from_numpy(logits), None, None), strict=True):
        assert said["scores"][said["label"]] == max(said["scores"].values())
        assert sum(said["scores"].values()) == pytest.approx(1.0, abs=1e-5)
        assert list(said["scores"].values()) == pytest.approx(
            torch.from_numpy(row).softmax(0).tolist(), abs=1e-6
        )
    for row, said in zip(logits, multi().predictions(torch.from_numpy(logits), None, None), strict=True):
        assert said["labels"] == [name for name, p in said["scores"].items() if p > 0.5]
        assert list(said["scores"].values()) == pytest.approx(torch.from_numpy(row).sigmoid().tolist())


def test_several_labels_are_learnt_end_to_end(make_run: Any, make_sites: Any, tmp_path: Path) -> None:
    """Words give away their labels: `heart` the first, `liver` the second, `lung` the third."""
    sites = make_sites(north=40, south=30)
    for splits in sites.values():
        for split, rows in splits.items():
            words = ("heart", "liver", "lung")
            splits[split] = [
                Row(
                    {
                        "text": r.values["text"],
                        "label": [i for i, word in enumerate(words) if word in r.values["text"].split()],
                    },
                    r.source,
                )
                for r in rows
            ]
    assert any(len(row.values["label"]) > 1 for row in sites["north"]["train"])
    site = Site(sites)
    config = make_run(
        task={"problem_type": "multi_label_classification", "class_weights": "balanced"},
        federation={"rounds": 8},
        training={"max_steps": 20, "per_device_train_batch_size": 8},
    )
    run = Run.open(site.prepare(config), tmp_path / "out")
    result = run_rounds(InProcessGrid(site, site.names), run)
    assert result.progress is not None and result.progress.best_value is not None
    truth = sites["north"]["validation"] + sites["south"]["validation"]
    shares = [sum(label in row.values["label"] for row in truth) / len(truth) for label in range(3)]
    always = sum(2 * share / (1 + share) for share in shares) / 3  # macro-F1 of naming every label
    assert run.metric == "macro_f1" and result.progress.best_value > max(always + 0.1, 0.85)
