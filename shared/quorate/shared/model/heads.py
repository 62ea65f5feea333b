"""Heads of several layers in the place of a model's own single layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from quorate.shared.config.run_config import HeadConfig
from quorate.shared.errors import ModelError
from quorate.shared.tasks import Task

_NAMES = ("classifier", "score")
"""Where transformers keeps the head of a classifier; PEFT trains and saves what has these names."""
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh,
}  # fmt: skip


class HeadDropout(nn.Dropout):
    """Dropout of a head, which the trainer replaces by one that draws for each site apart."""


def build_head(base: Any, config: HeadConfig, task: Task) -> None:
    """Replace the single linear layer that is `base`'s head; weights come from torch's global generator.

    The head becomes an `nn.Sequential`: per hidden size a linear layer, the activation and dropout, then a
    linear layer to as many figures as before.

    Raises: ModelError: the model has no such head, or one with hidden layers of its own.
    """
    name = next((n for n in task.head_modules(base) or _NAMES if hasattr(base, n)), None)
    head = getattr(base, name) if name else None
    if name is None or not isinstance(head, nn.Linear):
        found = f"is a {type(head).__name__}, not one linear layer" if name else "has none of that name"
        raise ModelError(
            f"adapter.head: {type(base).__name__} cannot take another head: its own ({name or 'classifier'}) "
            f"{found}; leave adapter.head out."
        )
    layers: list[nn.Module] = []
    size = head.in_features
    for hidden in config.hidden_sizes:
        layers += [nn.Linear(size, hidden), _ACTIVATIONS[config.activation](), HeadDropout(config.dropout)]
        size = hidden
    bias: object = head.bias  # typed as never None, which it is for bias=False
    setattr(base, name, nn.Sequential(*layers, nn.Linear(size, head.out_features, bias=bias is not None)))
