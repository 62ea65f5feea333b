"""Proofs on the model at hand, before anything is trained, that its rows do not mix.

Differential privacy clips row by row. Where one row of a batch changes another one's gradient (BatchNorm in
training mode, a loss divided by the batch's tokens, a layer that folds rows together) every step succeeds,
and the bound that the noise is made for does not hold.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from quorate.client.trainer.dp.per_sample import PerSample
from quorate.client.trainer.passes import Share, row_losses, training_mode
from quorate.client.trainer.stack import AdapterStack, RowsApart
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ModelError
from quorate.shared.model.lora_model import LoadedModel
from quorate.shared.seeds import rng
from quorate.shared.tasks.task import Example

log = logging.getLogger(__name__)

_TOLERANCE = 1e-4
"""Largest difference of a row's gradient with and without another row, over its norm.

Rounding in float32 came to at most 7e-7 over all tasks and architectures of the tests; a rotary embedding
that is another one for long batches changes a gradient by 3e-3 to 2e-2.
"""
_LEAST_NORM = 0.1
"""Over the largest norm of the rows tried: a smaller one counts as this much, as it is made of rounding."""
_ATTEMPTS = 3


def check_batch_statistics(model: LoadedModel) -> None:
    """Raise ModelError for a BatchNorm that would take its statistics from the batch."""
    for name, module in model.peft.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            why = "is in training mode" if module.training else "keeps no running statistics"
            raise ModelError(
                f"differential privacy: {name} ({type(module).__name__}) {why}, so the rows of a batch "
                "change one another's gradients; choose a base model without it, or whose running statistics "
                "are kept.",
                kind="batch-statistics",
            )


def check_rows_apart(
    stack: AdapterStack, run: RunConfig, site: str, examples: Sequence[Example]
) -> int | None:
    """Hold the gradients of a site's rows in one batch against plain autograd's of each row alone.

    Tried are the site's shortest row, its longest, and one of the largest size that the task makes, each two
    of them in both orders. All arrays are trained for that, from a start at which none of them has a gradient
    of zero, without dropout and in full precision. It is done once for a site's rows, and leaves the stack
    with another adapter. Where rows mix by no more than the length that they are padded to, as in a model
    without attention mask, they do not once all are padded to one length.
    Returns: the length that all rows must be padded to [tokens]; None for the longest of a batch.
    Raises: ModelError: rows mix all the same.
    """
    rows = _tried(run, examples)
    known = stack.rows_apart.get(site)
    checkpointed = run.training.gradient_checkpointing
    if known is not None and known.checkpointed == checkpointed and _same(known.rows, rows[:2]):
        return known.length
    adapter = run.adapter.model_copy(update={"lora_dropout": 0.0, "head": None})  # for its dropout
    training = run.training.model_copy(update={"bf16": False})
    run = run.model_copy(update={"adapter": adapter, "training": training})
    full = run.task.length(rows[-1]) if run.task.longest(rows[-1]) is not None else None
    length = None
    distance = _least_distance(stack, run, rows, length)
    if distance > _TOLERANCE and full is not None:
        length, short = full, distance
        distance = _least_distance(stack, run, rows, length)
        if distance <= _TOLERANCE:
            log.warning(
                "site %s: in %s the gradient of a row changes with the length of its batch (by %.2g of its "
                "norm), so for differential privacy every row is padded to %d tokens",
                site,
                _name(stack.model),
                short,
                full,
            )
    if distance > _TOLERANCE:
        raise ModelError(
            f"differential privacy: in {_name(stack.model)} the gradient of a row changes with the other "
            f"rows of its batch (by {distance:.2g} of its norm), so clipping row by row bounds nothing; "
            "choose another base model or other adapter.target_modules.",
            kind="rows-mixed",
        )
    stack.rows_apart[site] = RowsApart(tuple(rows[:2]), checkpointed, length)
    return length


def _tried(run: RunConfig, examples: Sequence[Example]) -> list[Example]:
    """Return the shortest example, the longest, and a longer one where the task could make one."""
    ordered = sorted(examples, key=run.task.length)
    found = [ordered[0], ordered[-1]]
    full = run.task.longest(found[-1])
    longer = full is not None and run.task.length(full) > run.task.length(found[-1])
    return [*found, full] if full is not None and longer else found


def _same(some: Sequence[Example], others: Sequence[Example]) -> bool:
    """Whether these are the very same objects: examples made ready again may be other ones."""
    return all(one is other for one, other in zip(some, others, strict=True))


def _least_distance(
    stack: AdapterStack, run: RunConfig, rows: Sequence[Example], length: int | None
) -> float:
    """Return the smallest of the distances from several starts, the first that is within the tolerance."""
    # The last bit may decide on which side of a ReLU's kink a number is, and so a gradient: what differs for
    # that reason does so from one start, and what mixes rows does so from every one.
    least = math.inf
    for attempt in range(_ATTEMPTS):
        least = min(least, _distance(stack, run, rows, length, attempt))
        if least <= _TOLERANCE:
            break
    return least


def _distance(
    stack: AdapterStack, run: RunConfig, rows: Sequence[Example], length: int | None, attempt: int
) -> float:
    """Return the largest relative difference of a row's gradient, beside another row against alone."""
    draw = rng(run.seed, "row-check", attempt)
    moved = stack.model.initial.map(
        lambda _, a: (a + 0.01 * draw.standard_normal(a.shape)).astype(np.float32)
    )
    stack.load([moved], stack.arrays)
    largest = 0.0
    with training_mode(stack, run, seed=0), _full_precision(stack.model):
        check_batch_statistics(stack.model)
        alone = [summed_gradient(stack, run, [each], length) for each in rows]
        norms = [_norm(each) for each in alone]
        least = max(_LEAST_NORM * max(norms), 1e-30)
        for pair in permutations(range(len(rows)), 2):
            together = row_gradients(stack, run, [rows[index] for index in pair], length)
            for at, index in enumerate(pair):
                apart = _norm({name: each[at] - alone[index][name] for name, each in together.items()})
                largest = max(largest, apart / max(norms[index], least))
    return largest


@contextmanager
def _full_precision(model: LoadedModel) -> Iterator[None]:
    """Compute in float32 inside the context: no TF32 in convolutions, no bfloat16 in layers of 4 bits."""
    layers = [module for module in model.peft.modules() if hasattr(module, "compute_dtype")]
    before = [layer.compute_dtype for layer in layers]
    for layer in layers:
        layer.compute_dtype = torch.float32  # type: ignore[assignment]
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        for layer, dtype in zip(layers, before, strict=True):
            layer.compute_dtype = dtype


def _name(model: LoadedModel) -> str:
    return type(model.peft.get_base_model()).__name__


def row_gradients(
    stack: AdapterStack, run: RunConfig, examples: Sequence[Example], length: int | None = None
) -> dict[str, Tensor]:
    """Return each example's own gradient of the stack's first adapter, name -> [rows, ...]."""
    share = Share(0, examples, torch.Generator(stack.model.peft.device))
    kept = backward_by_row(stack, run, [share], length)
    return kept.of_site(stack.arrays, 0, len(examples))


def backward_by_row(
    stack: AdapterStack, run: RunConfig, shares: Sequence[Share], length: int | None = None
) -> PerSample:
    """Run the shares through the model and back, and return the rows' own gradients.

    Raises: ModelError: an array was trained outside of the layers that keep them apart.
    """
    kept = PerSample(max(len(share.rows) for share in shares))
    with row_losses(stack, run, shares, length, kept) as (each, real):
        (each * real).sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in stack.model.peft.named_parameters():
        if parameter.grad is not None:
            raise ModelError(
                f"differential privacy: the gradient of {name} was summed over the rows of a batch, so no "
                "row could be clipped; leave this module out of adapter.target_modules and modules_to_save.",
                kind="summed-over-rows",
            )
    return kept


def summed_gradient(
    stack: AdapterStack, run: RunConfig, examples: Sequence[Example], length: int | None = None
) -> dict[str, Tensor]:
    """Return plain autograd's gradient of the sum of the examples' losses, name -> array."""
    wanted = {name: array for name, array in stack.arrays.items() if array.requires_grad}
    share = Share(0, examples, torch.Generator(stack.model.peft.device))
    with row_losses(stack, run, [share], length) as (each, _):
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            each.sum(), list(wanted.values()), allow_unused=True
        )
    return {
        name: torch.zeros_like(array[0]) if gradient is None else gradient[0]
        for (name, array), gradient in zip(wanted.items(), found, strict=True)
    }


def _norm(gradient: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(each.double().square().sum()) for each in gradient.values()))
