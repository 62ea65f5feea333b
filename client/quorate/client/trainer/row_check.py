"""Proofs on the model at hand, before anything is trained, that its rows do not mix.

Differential privacy clips row by row. Where one row of a batch changes another one's gradient (BatchNorm in
training mode, a loss divided by the batch's tokens, a layer that folds rows together) every step succeeds,
and the bound that the noise is made for does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from quorate.client.trainer.passes import Share, row_losses, training_mode
from quorate.client.trainer.per_sample import PerSample
from quorate.client.trainer.stack import AdapterStack
from quorate.shared.config.run import RunConfig
from quorate.shared.errors import ModelError
from quorate.shared.model import LoadedModel
from quorate.shared.seeds import rng
from quorate.shared.tasks.base import Example

_TOLERANCE, _QUANTISED_TOLERANCE = 1e-3, 5e-2
"""Largest difference of a row's gradient with and without another row, over its norm."""
_ATTEMPTS = 3


def check_batch_statistics(model: LoadedModel) -> None:
    """Raise ModelError for a BatchNorm that would take its statistics from the batch."""
    for name, module in model.peft.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            why = "is in training mode" if module.training else "keeps no running statistics"
            raise ModelError(
                f"differential privacy: {name} ({type(module).__name__}) {why}, so the rows of a batch "
                "change one another's gradients; choose a base model without it, or whose running statistics "
                "are kept."
            )


def check_rows_apart(
    model: LoadedModel, stack: AdapterStack, run: RunConfig, examples: Sequence[Example]
) -> None:
    """Hold the gradients of two rows in one batch against plain autograd's of each row alone.

    All arrays are trained for that, from a start at which none of them has a gradient of zero, without
    dropout and in full precision. It is done once for a stack, and leaves the stack with another adapter.

    Args:
        examples: a site's training examples; the first two are taken.
    Raises: ModelError: they differ.
    """
    if stack.rows_apart:
        return
    adapter = run.adapter.model_copy(update={"lora_dropout": 0.0, "head": None})  # for its dropout
    training = run.training.model_copy(update={"bf16": False})
    run = run.model_copy(update={"adapter": adapter, "training": training})
    pair = [examples[0], examples[min(1, len(examples) - 1)]]
    tolerance = _QUANTISED_TOLERANCE if run.model.quantised else _TOLERANCE
    # The last bit may decide on which side of a ReLU's kink a number is, and so a gradient: what differs for
    # that reason does so from one start, and what mixes rows does so from every one.
    for attempt in range(_ATTEMPTS):
        distance = _distance(model, stack, run, pair, attempt)
        if distance <= tolerance:
            stack.rows_apart = True
            return
    raise ModelError(
        f"differential privacy: in {type(model.peft.get_base_model()).__name__} the gradient of a row "
        f"changes with the other rows of its batch (by {distance:.2g} of its norm), so clipping row by row "
        "bounds nothing; choose another base model or other adapter.target_modules."
    )


def _distance(
    model: LoadedModel, stack: AdapterStack, run: RunConfig, pair: Sequence[Example], attempt: int
) -> float:
    """Return the largest relative difference of the rows' gradients, together against alone."""
    draw = rng(run.seed, "row-check", attempt)
    moved = model.initial.map(lambda _, a: (a + 0.01 * draw.standard_normal(a.shape)).astype(np.float32))
    stack.load([moved], stack.arrays)
    with training_mode(model, stack, run, seed=0):
        check_batch_statistics(model)
        together = row_gradients(model, stack, run, pair)
        alone = [summed_gradient(model, stack, run, [each]) for each in pair]
    differences = [
        _norm({name: gradients[row] - expected[name] for name, gradients in together.items()})
        for row, expected in enumerate(alone)
    ]
    return max(differences) / max(*map(_norm, alone), 1e-30)


def row_gradients(
    model: LoadedModel, stack: AdapterStack, run: RunConfig, examples: Sequence[Example]
) -> dict[str, Tensor]:
    """Return each example's own gradient of the stack's first adapter, name -> [rows, ...]."""
    share = Share(0, examples, torch.Generator(model.peft.device))
    kept = backward_by_row(model, stack, run, [share])
    return kept.of_site(stack.arrays, 0, len(examples))


def backward_by_row(
    model: LoadedModel, stack: AdapterStack, run: RunConfig, shares: Sequence[Share]
) -> PerSample:
    """Run the shares through the model and back, and return the rows' own gradients.

    Raises: ModelError: an array was trained outside of the layers that keep them apart.
    """
    kept = PerSample(max(len(share.rows) for share in shares))
    stack.layout.per_sample = kept
    try:
        each, real = row_losses(model, stack, run, shares)
        (each * real).sum().backward()  # type: ignore[no-untyped-call]
    finally:
        stack.layout.per_sample = None
    for name, parameter in model.peft.named_parameters():
        if parameter.grad is not None:
            raise ModelError(
                f"differential privacy: the gradient of {name} was summed over the rows of a batch, so no "
                "row could be clipped; leave this module out of adapter.target_modules and modules_to_save."
            )
    return kept


def summed_gradient(
    model: LoadedModel, stack: AdapterStack, run: RunConfig, examples: Sequence[Example]
) -> dict[str, Tensor]:
    """Return plain autograd's gradient of the sum of the examples' losses, name -> array."""
    wanted = {name: array for name, array in stack.arrays.items() if array.requires_grad}
    each, _ = row_losses(model, stack, run, [Share(0, examples, torch.Generator(model.peft.device))])
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        each.sum(), list(wanted.values()), allow_unused=True
    )
    return {
        name: torch.zeros_like(array[0]) if gradient is None else gradient[0]
        for (name, array), gradient in zip(wanted.items(), found, strict=True)
    }


def _norm(gradient: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(each.double().square().sum()) for each in gradient.values()))
