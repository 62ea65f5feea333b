"""Rows' own gradients two ways: as the private step has them, and by a loop over batches of one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from loaded_models import load_model
from torch import Tensor

from quorate.client.trainer.dp.row_isolation import backward_by_row
from quorate.client.trainer.passes import Share, training_mode
from quorate.client.trainer.stack import AdapterStack, _saved_name
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.config.run_config import RunConfig
from quorate.shared.model.lora_model import LoadedModel
from quorate.shared.tasks.task import Example, Row

Gradients = dict[str, Tensor]
"""Array name -> [rows, ...]."""


def noisy(adapter: Adapter, seed: int, scale: float = 0.1) -> Adapter:
    """The adapter with lora_B moved off zero, where A would get no gradient."""
    draw = np.random.default_rng(seed)
    return adapter.map(lambda _, a: (a + scale * draw.standard_normal(a.shape)).astype(np.float32))


def encoded(run: RunConfig, model: LoadedModel, rows: Sequence[Row]) -> list[Example]:
    return run.task.encode(rows, model.processor)


def one_by_one(run: RunConfig, rows: Sequence[Row], start: Adapter, unfrozen: str | None = None) -> Gradients:
    """PEFT's own model, one row at a time, plain autograd over everything that is trained.

    Args:
        unfrozen: ending of a parameter's name that is trained besides, as if by mistake.
    """
    model = load_model(run)
    model.write_adapter(start)
    for name, parameter in model.peft.named_parameters():
        if unfrozen is not None and name.endswith(unfrozen):
            parameter.requires_grad_(True)
    trained = {name: p for name, p in model.peft.named_parameters() if p.requires_grad}
    found: dict[str, list[Tensor]] = {}
    for example in encoded(run, model, rows):
        model.peft.zero_grad(set_to_none=True)
        batch = run.task.collate([example], model.processor)
        run.task.loss(run.task.forward(model.peft, batch), batch).sum().backward()  # type: ignore[no-untyped-call]
        for name, parameter in trained.items():
            module, _, kind = name.rpartition(".")
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            found.setdefault(_saved_name(module, kind), []).append(gradient)
    return {name: torch.stack(each) for name, each in found.items()}


def kept(
    run: RunConfig,
    sites: Sequence[Sequence[Row]],
    starts: Sequence[Adapter],
    trainable: Sequence[str] | None = None,
    prepare: Any = None,
) -> list[Gradients]:
    """The sites' rows in one pass, as the private step takes it.

    Args:
        prepare: called with model and stack before the pass.
    """
    model = load_model(run)
    stack = AdapterStack.install(model)
    stack.load(starts, model.initial if trainable is None else trainable)
    if prepare is not None:
        prepare(model, stack)
    shares = [
        Share(position, encoded(run, model, rows), torch.Generator()) for position, rows in enumerate(sites)
    ]
    with training_mode(stack, run, seed=0):
        per_sample = backward_by_row(stack, run, shares)
    return [per_sample.of_site(stack.arrays, at, len(rows)) for at, rows in enumerate(sites)]


def largest_error(found: Gradients, expected: Gradients) -> float:
    """Largest L2 distance of an array's gradient for one row, over the norm of that row's whole gradient.

    Infinite where the two are not of the same arrays and rows.
    """
    if found.keys() != expected.keys() or any(found[n].shape != expected[n].shape for n in expected):
        return float("inf")
    whole = torch.stack([e.flatten(1).norm(dim=1) for e in expected.values()]).norm(dim=0)
    errors = [(found[name] - expected[name]).flatten(1).norm(dim=1) for name in expected]
    return float((torch.stack(errors) / whole.clamp(min=1e-30)).max())
