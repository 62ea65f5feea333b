"""Gradient checkpointing: keep the inputs of the base's layers, compute the rest again in the backward pass.

transformers checkpoints layers that are in training mode, but the frozen base stays in eval mode here: only
the layers' own flag is raised, their submodules are left as they are. LoRA dropout draws from a generator per
site, which torch's checkpoint does not know: without care the second pass would draw masks of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from quorate.client.trainer.stack import AdapterStack
from quorate.shared.model.lora_model import checkpoint_layers


@contextmanager
def checkpointed(stack: AdapterStack) -> Iterator[None]:
    """Have the layers of the stack's model checkpointed inside the context."""
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
