"""Measure one adapter on a site's rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from quorate.client.trainer.stack import AdapterStack
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import NonFiniteUpdate
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.tasks.task import Batch, Example


def forward(
    stack: AdapterStack, run: RunConfig, adapter: Adapter, examples: Sequence[Example]
) -> Iterator[tuple[list[int], Batch, Any]]:
    """Yield (row indices, batch, the task's logits) over all examples, of similar length together."""
    stack.load([adapter], ())
    order = sorted(range(len(examples)), key=lambda row: run.task.length(examples[row]))
    size = run.training.per_device_eval_batch_size
    device = stack.model.peft.device
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        batch = run.task.collate([examples[row] for row in rows], stack.model.processor).to(device)
        with torch.inference_mode():  # full precision also where training is bf16: figures are compared
            logits = run.task.forward(stack.model.peft, batch)
        yield rows, batch, logits


def evaluate(stack: AdapterStack, run: RunConfig, adapter: Adapter, examples: Sequence[Example]) -> Outcomes:
    """Return the counts of outcomes and the summed loss of `adapter` on `examples`.

    Raises: NonFiniteUpdate: the loss is NaN or infinite.
    """
    outcomes = []
    loss = 0.0
    sums: Counter[str] = Counter()
    for _, batch, logits in forward(stack, run, adapter, examples):
        outcomes.append(run.task.outcomes(logits, batch))
        loss += float(run.task.measured_loss(logits, batch).double().sum())
        for name, value in run.task.sums(logits, batch).items():
            sums[name] += value  # type: ignore[assignment]  # a Counter adds floats as well
    if not outcomes:
        return Outcomes()
    if not all(map(math.isfinite, (loss, *sums.values()))):
        raise NonFiniteUpdate("the loss of this adapter is NaN or infinite; lower training.learning_rate.")
    return Outcomes.of_rows(np.concatenate(outcomes), loss, len(examples), dict(sums))
