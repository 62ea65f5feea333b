"""A task that no release has: of two texts, which one is better? A row is a pair of sequences.

It lives here alone, and shows that the trainer needs nothing more than its own file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from quorate.client.trainer.evaluate import evaluate
from quorate.client.trainer.fit import fit
from quorate.client.trainer.passes import SiteTask
from quorate.client.trainer.stack import AdapterStack
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ProtocolError
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.model.lora_model import load_model
from quorate.shared.progress import ignore_step
from quorate.shared.tasks.task import Batch, Example, Kind, Metrics, Row
from quorate.shared.tasks.text.text_task import TextTask

BETTER, WORSE = "heart blood pain", "liver dose drug"


class Preference(TextTask):
    """Score texts so that the better one of a pair has the higher score (Bradley and Terry 1952)."""

    default_metric: ClassVar[str] = "accuracy"
    sequences: ClassVar[int] = 2
    peft_task_type: ClassVar[str | None] = "SEQ_CLS"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"

    name: Literal["preference"] = "preference"
    """The task."""

    @property
    def columns(self) -> Mapping[str, Kind]:
        return {"chosen": "text", "rejected": "text"}

    @property
    def metrics_for_best_model(self) -> tuple[str, ...]:
        return ("accuracy",)

    def model_kwargs(self) -> dict[str, Any]:
        return {"num_labels": 1}

    def encode(self, rows: Sequence[Row], processor: Any, *, labelled: bool = True) -> list[Example]:
        def ids(row: Row, column: str) -> list[int]:
            found: list[int] = processor(row.values[column], truncation=True, max_length=self.max_length)[
                "input_ids"
            ]
            return found

        return [Example({column: ids(row, column) for column in self.columns}, 0) for row in rows]

    def length(self, example: Example) -> int:
        return max(map(len, example.features.values()))

    def collate(self, examples: Sequence[Example], processor: Any, length: int | None = None) -> Batch:
        pairs = [{"input_ids": e.features[column]} for e in examples for column in self.columns]
        padding = {"padding": "max_length", "max_length": length} if length else {"padding": True}
        inputs = dict(processor.pad(pairs, return_tensors="pt", **padding))
        return Batch(inputs, torch.zeros(len(examples)), torch.ones(len(examples)))

    def loss(self, logits: Any, batch: Batch) -> Tensor:
        return -functional.logsigmoid(self.margin(logits)) * batch.weights

    def margin(self, logits: Any) -> Tensor:
        chosen, rejected = logits.float().view(-1, 2).unbind(dim=1)
        return chosen - rejected

    def outcomes(self, logits: Any, batch: Batch) -> npt.NDArray[np.int64]:
        return (self.margin(logits) > 0).long()[:, None].numpy()

    def check_outcomes(self, outcomes: Outcomes) -> None:
        if not set(outcomes.values) <= {(0,), (1,)}:
            raise ProtocolError("sent outcomes that are not right or wrong.")

    def metrics(self, outcomes: Outcomes) -> Metrics:
        values, counts = outcomes.arrays()
        return {"accuracy": float(counts @ values[:, 0] / counts.sum())}

    def predictions(self, logits: Any, batch: Batch, processor: Any) -> list[dict[str, Any]]:
        return [{"margin": margin} for margin in self.margin(logits).tolist()]


class PreferenceRun(RunConfig):
    """A run file that may name it."""

    task: Preference  # type: ignore[assignment]


@pytest.fixture
def run(make_run: Any) -> PreferenceRun:
    config = make_run(
        training={"max_steps": 20, "per_device_train_batch_size": 3, "learning_rate": 0.5, "optim": "sgd"},
        adapter={"r": 4, "lora_dropout": 0.2},
    ).model_dump()
    return PreferenceRun.model_validate({**config, "task": {"name": "preference", "max_length": 24}})


def pairs(count: int, words: str) -> list[Row]:
    return [
        Row({"chosen": f"{BETTER} {words}" * (1 + n % 2), "rejected": WORSE}, f"{words}:{n}")
        for n in range(count)
    ]


def test_sites_in_one_stack_learn_what_each_learns_alone(run: PreferenceRun) -> None:
    rows = {"a": pairs(7, "cough"), "b": pairs(4, "scan lung"), "c": pairs(2, "chest")}

    def trained(names: Sequence[str]) -> dict[str, Any]:
        model = load_model(run)
        parts = [SiteTask(n, run.task.encode(rows[n], model.processor), model.initial) for n in names]
        done = fit(AdapterStack.install(model), run, 1, parts, frozenset(model.initial), ignore_step)
        return {name: each.adapter for name, each in zip(names, done, strict=True)}

    together = trained(list(rows))
    for name in rows:
        alone = trained([name])[name]
        for array, values in together[name].items():
            np.testing.assert_allclose(values, alone[array], rtol=0, atol=2e-5, err_msg=array)


def test_it_learns_and_is_measured(run: PreferenceRun) -> None:
    model = load_model(run)
    stack = AdapterStack.install(model)
    examples = run.task.encode(pairs(9, "cough"), model.processor)
    (done,) = fit(
        stack, run, 1, [SiteTask("a", examples, model.initial)], frozenset(model.initial), ignore_step
    )
    before, after = (evaluate(stack, run, each, examples) for each in (model.initial, done.adapter))
    assert after.loss_sum < 0.5 * before.loss_sum
    assert run.task.metrics(after)["accuracy"] == 1.0


def test_a_pair_is_one_unit_of_privacy(run: PreferenceRun) -> None:
    private = run.model_dump() | {"privacy": {"unit": "record", "noise_multiplier": 1.0}}
    config = PreferenceRun.model_validate(private)
    model = load_model(config)
    stack = AdapterStack.install(model)
    part = SiteTask("a", config.task.encode(pairs(5, "cough"), model.processor), model.initial)
    (done,) = fit(stack, config, 1, [part], frozenset(model.initial), ignore_step)
    assert done.metrics["sampling_probability"] == 3 / 5, "of pairs, not of texts"
