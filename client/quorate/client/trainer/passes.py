"""What every kind of training has in common: the sites' part in a stacked pass, and the pass itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from quorate.client.trainer.dp.canaries import Canaries
from quorate.client.trainer.dp.noise import seed_secretly
from quorate.client.trainer.dp.per_sample import PerSample
from quorate.client.trainer.stack import AdapterStack, Layout
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.config.run_config import RunConfig
from quorate.shared.model.lora_model import LoadedModel, checkpoint_layers
from quorate.shared.tasks.task import Batch, Example


@dataclass(frozen=True)
class SiteTask:
    """One site's part of a stacked pass.

    Args:
        site: its name, which with the seed decides data order and dropout.
        start: the adapter it starts from.
        groups: each example's group, where the unit of privacy is a group; they stay at the site.
        canaries: units that an audit puts beside the site's own; none in a run.
    """

    site: str
    examples: Sequence[Example]
    start: Adapter
    groups: Sequence[str] | None = None
    canaries: Canaries | None = None


@dataclass(frozen=True)
class Fitted:
    """What one site's training gave."""

    adapter: Adapter
    steps: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Share:
    """One site's rows of a forward pass.

    Args:
        position: the site's place in the stack.
        rows: at least one.
        dropout: its generator.
    """

    position: int
    rows: Sequence[Example]
    dropout: torch.Generator


@contextmanager
def row_losses(
    stack: AdapterStack,
    run: RunConfig,
    shares: Sequence[Share],
    length: int | None = None,
    per_sample: PerSample | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run the rows of several sites through the model; a backward pass goes inside the context.

    Sites with fewer rows are filled up with copies of a row of theirs.

    Args:
        length: what rows are padded to [tokens]; the longest of them when left out.
        per_sample: keeps rows' own gradients in the backward pass.
    Yields: each row's own loss [k, b], and which rows are real [k, b].
    """
    most = max(len(share.rows) for share in shares)
    filled = [e for share in shares for e in (*share.rows, *[share.rows[0]] * (most - len(share.rows)))]
    batch = run.task.collate(filled, stack.model.processor, length).to(stack.model.peft.device)
    real = torch.tensor(
        [[r < len(share.rows) for r in range(most)] for share in shares], device=batch.weights.device
    )
    with stack.batch(_layout(stack.model, run, shares, per_sample)):
        yield run.task.loss(_logits(stack.model, run, batch), batch).view(len(shares), most), real


def _layout(
    model: LoadedModel, run: RunConfig, shares: Sequence[Share], per_sample: PerSample | None
) -> Layout:
    head = run.adapter.head
    with_dropout = run.adapter.lora_dropout > 0 or (head is not None and head.dropout > 0)
    return Layout(
        sites=tuple(share.position for share in shares),
        rows=tuple(len(share.rows) for share in shares),
        sequences=run.task.sequences,
        generators=tuple(share.dropout for share in shares) if with_dropout else None,
        padded_in_front=getattr(model.processor, "padding_side", "right") == "left",
        per_sample=per_sample,
    )


def _logits(model: LoadedModel, run: RunConfig, batch: Batch) -> Any:
    device = model.peft.device
    with torch.autocast(device.type, torch.bfloat16, enabled=run.training.bf16):
        return run.task.forward(model.peft, batch)


@contextmanager
def training_mode(stack: AdapterStack, run: RunConfig, seed: int | None) -> Iterator[None]:
    """Put the model in training mode and back.

    The frozen base stays in eval mode unless its own dropout is asked for; BatchNorm always does, or the
    rows of a batch would leak into one another. The global generator, from which only the base's own dropout
    draws, is set to `seed` (to a secret state when that is None) and put back.
    """
    devices = [stack.model.peft.device] if stack.model.peft.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        if seed is None:
            seed_secretly(stack.model.peft.device)
        else:
            torch.manual_seed(seed)
        stack.model.peft.train(run.training.base_dropout)
        for module in stack.model.peft.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        stack.set_lora_training(True)
        saving = run.training.gradient_checkpointing
        try:
            with checkpointed(stack) if saving else nullcontext():
                yield
        finally:
            stack.model.peft.eval()


@contextmanager
def checkpointed(stack: AdapterStack) -> Iterator[None]:
    """Have the layers of the stack's model checkpointed inside the context.

    transformers checkpoints layers that are in training mode, but the frozen base stays in eval mode here:
    only the layers' own flag is raised, their submodules are left as they are. LoRA dropout draws from a
    generator per site, which torch's checkpoint does not know: without care the second pass would draw masks
    of its own.
    """
    layers = checkpoint_layers(stack.model.peft)
    before = [layer.training for layer in layers]
    # Not reentrant: the input of a frozen base's first layer needs no gradient, which that kind cannot do.
    run: Any = partial(checkpoint, use_reentrant=False, context_fn=partial(_same_dropout, stack))
    for layer in layers:
        layer.gradient_checkpointing, layer.training = True, True
        layer._gradient_checkpointing_func = run
    try:
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.gradient_checkpointing, layer.training = False, training


def _same_dropout(stack: AdapterStack) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return contexts of a layer's first pass and of its second, which draws what the first drew."""
    generators = stack.layout.generators or ()
    drawn_from = [generator.get_state() for generator in generators]

    @contextmanager
    def again() -> Iterator[None]:
        now = [generator.get_state() for generator in generators]
        for generator, state in zip(generators, drawn_from, strict=True):
            generator.set_state(state)
        try:
            yield
        finally:
            for generator, state in zip(generators, now, strict=True):
                generator.set_state(state)

    return nullcontext(), again()
