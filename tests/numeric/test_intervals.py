"""Intervals cover the truth as often as they say: by exact sums where there are any, else by simulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from refusals import refuses
from scipy import stats

from quorate.server.rounds.evaluation import intervals_of, local_gain, summarise
from quorate.shared.errors import ProtocolError
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.tasks import SequenceClassification, Task, TokenClassification

TWO = SequenceClassification(name="sequence_classification", labels=("no", "yes"))
DISEASES = TokenClassification(name="token_classification", labels=("O", "B-Disease", "I-Disease"))
ORGANS = TokenClassification(
    name="token_classification", labels=("O", "B-Heart", "I-Heart", "B-Liver", "I-Liver")
)


def hits(correct: int, rows: int) -> Outcomes:
    pairs = [[1, 1]] * correct + [[1, 0]] * (rows - correct)
    return Outcomes.of_rows(np.array(pairs, dtype=np.int64).reshape(-1, 2), 0.0)


@pytest.mark.parametrize("rows", [15, 30, 100, 681])
def test_the_interval_of_an_accuracy_covers_it(rows: int) -> None:
    """The chance to cover, summed over all numbers of right rows, for accuracies of 0.5 to 0.98."""
    right = np.arange(rows + 1)
    low, high = np.array([intervals_of(TWO, hits(k, rows))["accuracy"] for k in right.tolist()]).T
    chance = [
        stats.binom.pmf(right, rows, truth) @ ((low <= truth) & (truth <= high))
        for truth in np.linspace(0.5, 0.98, 481)
    ]
    assert min(chance) >= 0.93 and np.mean(chance) < 0.97
    assert (low < right / rows).sum() == rows and (high > right / rows).sum() == rows


def test_the_interval_of_an_accuracy_is_that_of_agresti_and_coull() -> None:
    for correct, rows in ((80, 100), (30, 200), (20, 20), (0, 5)):
        z = stats.norm.ppf(0.975)
        centre = (correct + z**2 / 2) / (rows + z**2)
        reach = z * np.sqrt(centre * (1 - centre) / (rows + z**2))
        low, high = intervals_of(TWO, hits(correct, rows))["accuracy"]
        assert [low, high] == pytest.approx([max(0, centre - reach), min(1, centre + reach)])
    low, high = intervals_of(TWO, hits(20, 20))["accuracy"]
    assert low < 0.85 and high == 1, "20 right of 20 leaves other accuracies possible"


def sentences(draw: Any, tests: int, rows: int, right: float, alike: float, empty: float) -> Any:
    """Draw (right, wrong, missed) of each sentence, [tests, rows, 3]; entities of one fail together."""
    there = np.where(draw.random((tests, rows)) < empty, 0, draw.geometric(0.35, (tests, rows)))
    good = draw.binomial(there, draw.beta(alike * right, alike * (1 - right), (tests, rows)))
    wrong = draw.binomial(there - good, 0.5) + draw.poisson(0.3 * (1 - right), (tests, rows))
    return np.stack([good, wrong, there - good], axis=-1)


def found(counts: Any, task: Task = DISEASES) -> Outcomes:
    """Outcomes of sentences with these counts, [rows, 3 * types]."""
    totals, products = counts.sum(axis=0), np.triu(counts.T @ counts)
    places = [(i, j) for i, j in np.argwhere(products).tolist()]
    values = [(i // 3, i % 3) for i in range(len(totals)) if totals[i]]
    outcomes = Outcomes(
        values=tuple(values),
        counts=tuple(int(totals[3 * kind + what]) for kind, what in values),
        num_rows=len(counts),
        sums={f"{i}x{j}": float(products[i, j]) for i, j in places},
    )
    task.check_outcomes(outcomes)
    return outcomes


@pytest.mark.parametrize("rows", [30, 100, 400])
@pytest.mark.parametrize(("right", "alike"), [(0.5, 1), (0.8, 1), (0.95, 1), (0.8, 5)])
def test_the_intervals_of_entities_cover_their_rates_where_sentences_fail_as_a_whole(
    rows: int, right: float, alike: float
) -> None:
    draw = np.random.default_rng(7)
    total = sentences(draw, 1, 400_000, right, alike, 0.4)[0].sum(axis=0)
    good, wrong, missed = total.tolist()
    truth = {
        "precision": good / (good + wrong),
        "recall": good / (good + missed),
        "f1": 2 * good / (2 * good + wrong + missed),
    }
    tests = sentences(draw, 500, rows, right, alike, 0.4)
    covered = dict.fromkeys(truth, 0)
    for counts in tests:
        bounds = intervals_of(DISEASES, found(counts))
        for metric, value in truth.items():
            covered[metric] += bounds[metric][0] <= value <= bounds[metric][1]
        assert bounds["macro_f1"] == bounds["f1"], "there is one type"
    # 500 draws have a standard error of 0.01 at 0.95.
    assert all(count / len(tests) >= 0.92 for count in covered.values()), covered


def test_entities_taken_for_independent_would_be_too_sure() -> None:
    """The same counts in one-entity sentences give what entities by themselves would."""
    draw = np.random.default_rng(1)
    counts = sentences(draw, 1, 200, 0.8, 1, 0.0)[0]
    apart = np.concatenate([np.eye(3, dtype=int)[[i] * n] for i, n in enumerate(counts.sum(axis=0).tolist())])
    (low, high), (lower, higher) = (intervals_of(DISEASES, found(each))["f1"] for each in (counts, apart))
    assert high - low > 1.2 * (higher - lower)


def test_products_add_up_over_sites() -> None:
    draw = np.random.default_rng(2)
    parts = [np.concatenate(sentences(draw, 2, 20, 0.8, 1, 0.3), axis=1) for _ in range(3)]
    pooled = Outcomes.pooled(found(part, ORGANS) for part in parts)
    together = found(np.concatenate(parts), ORGANS)
    assert pooled == together
    bounds = intervals_of(ORGANS, pooled)
    for metric, (low, high) in bounds.items():
        assert low < ORGANS.metrics(pooled)[metric] < high


@pytest.mark.parametrize(
    ("rows", "classes", "uneven"), [(50, 2, 0.0), (100, 3, 0.7), (400, 5, 0.5), (400, 10, 0.1)]
)
@pytest.mark.parametrize("right", [0.6, 0.9, 0.98])
def test_the_interval_of_macro_f1_covers_it_where_there_is_one(
    rows: int, classes: int, uneven: float, right: float
) -> None:
    task = SequenceClassification(
        name="sequence_classification", labels=tuple(f"kind {k}" for k in range(classes))
    )
    shares = np.exp(-uneven * np.arange(classes))
    confusion = np.full((classes, classes), (1 - right) / (classes - 1))
    np.fill_diagonal(confusion, right)
    cells = (shares[:, None] / shares.sum() * confusion).ravel()
    joint = cells.reshape(classes, classes)
    truth = np.mean(2 * joint.diagonal() / (joint.sum(axis=0) + joint.sum(axis=1)))
    draws = np.random.default_rng(5).multinomial(rows, cells, 400)
    covered, given = 0, 0
    for counts in draws:
        pairs = tuple((index // classes, index % classes) for index in np.flatnonzero(counts).tolist())
        outcomes = Outcomes(values=pairs, counts=tuple(counts[counts > 0].tolist()))
        if (bounds := intervals_of(task, outcomes).get("macro_f1")) is not None:
            given += 1
            covered += bounds[0] <= truth <= bounds[1]
    assert given > 100 and covered / given >= 0.915, (covered, given)


def test_a_mean_over_classes_of_a_handful_of_rows_has_no_interval() -> None:
    labels = tuple(f"kind {k}" for k in range(10))
    task = SequenceClassification(name="sequence_classification", labels=labels)
    for rows, has in ((3, False), (40, True)):
        outcomes = Outcomes(values=tuple((k, k) for k in range(10)), counts=(rows,) * 10)
        assert ("macro_f1" in intervals_of(task, outcomes)) == has
        assert "accuracy" in intervals_of(task, outcomes)


def test_several_labels_a_row() -> None:
    task = SequenceClassification(
        name="sequence_classification", labels=("a", "b"), problem_type="multi_label_classification"
    )
    rows = np.array([[1, 0, 1, 0]] * 40 + [[1, 1, 1, 0]] * 20 + [[0, 0, 0, 1]] * 5)
    measured = summarise(task, "test", {"north": Outcomes.of_rows(rows, 1.0)}, intervals=True)
    assert set(measured.intervals["pooled"]) == {"exact_match", "micro_f1", "macro_f1"}
    for metric, (low, high) in measured.intervals["pooled"].items():
        assert low < measured.pooled[metric] < high
    # A row with two labels is one unit: its two answers are not two.
    doubled = np.array([[1, 1, 1, 1]] * 60 + [[1, 1, 0, 0]] * 60)
    single = np.array([[1, 0, 1, 0]] * 60 + [[1, 0, 0, 0]] * 60)
    one, other = (intervals_of(task, Outcomes.of_rows(each, 0.0))["micro_f1"] for each in (doubled, single))
    assert one == pytest.approx(other)


@pytest.mark.parametrize("rows", [30, pytest.param(100, marks=pytest.mark.slow)])
def test_the_interval_of_a_gain_covers_it(rows: int) -> None:
    for ours, theirs in ((0.8, 0.6), (0.97, 0.97), (0.95, 0.8)):
        right = np.arange(rows + 1)
        gains = [
            [
                local_gain(TWO, "accuracy", hits(a, rows), hits(b, rows), intervals=True).interval
                for b in right.tolist()
            ]
            for a in right.tolist()
        ]
        low, high = np.moveaxis(np.array(gains), -1, 0)
        covered = (low <= ours - theirs) & (ours - theirs <= high)
        chance = stats.binom.pmf(right, rows, ours) @ covered @ stats.binom.pmf(right, rows, theirs)
        assert chance >= 0.93, (ours, theirs, chance)


@pytest.mark.parametrize(
    ("sums", "kind"),
    [
        ({}, "impossible-products"),
        ({"0x0": 4.0, "1x1": 2.0}, "impossible-products"),
        ({"0x0": 101.0, "1x1": 2.0}, "impossible-products"),
        ({"0x0": 10.0, "1x1": 1.0}, "impossible-products"),
        ({"0x0": 10.0, "1x1": 2.0, "0x1": 5.0}, "impossible-products"),
        ({"0x0": 10.0, "1x1": 2.0, "0x1": -1.0}, "impossible-products"),
        ({"0x0": 10.0, "1x1": 2.0, "1x0": 1.0}, "unknown-sums"),
        ({"0x0": 10.0, "1x1": 2.0, "squared": 1.0}, "unknown-sums"),
    ],
)
def test_products_that_no_sentences_have_are_refused(sums: dict[str, float], kind: str) -> None:
    good = Outcomes(values=((0, 0), (0, 1)), counts=(10, 2), num_rows=12, sums={"0x0": 10.0, "1x1": 2.0})
    DISEASES.check_outcomes(good)
    with refuses(ProtocolError, kind):
        DISEASES.check_outcomes(good.model_copy(update={"sums": sums}))
