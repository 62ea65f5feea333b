"""The optimiser of one site, over its slices of the stack: what it would be if the site were alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import Adafactor

from quorate.shared.adapters.selection import rate_factors
from quorate.shared.config.run_config import TrainingConfig
from quorate.shared.errors import ConfigError


def make_optimizer(
    training: TrainingConfig, parameters: Mapping[str, nn.Parameter], names: Iterable[str] | None = None
) -> torch.optim.Optimizer:
    """Return the configured optimiser over one site's parameters.

    As in transformers' Trainer, biases are not decayed (norms, which it leaves out too, are never trained).

    Args:
        parameters: array name -> parameter.
        names: all arrays of the adapter, frozen ones too, by which layers are counted; those of `parameters`
            when left out.
    Returns: the optimiser; each of its groups carries `factor`, its factor on the learning rate.
    """
    groups = _groups(training, parameters, rate_factors(training, parameters if names is None else names))
    if training.optim == "adafactor":
        # As transformers' Trainer sets it up: the rate is the run's, not one that Adafactor makes up.
        adafactor: torch.optim.Optimizer = Adafactor(  # type: ignore[no-untyped-call]
            groups, training.learning_rate, scale_parameter=False, relative_step=False
        )
        return adafactor
    if training.optim == "adamw_bnb_8bit":
        return _adamw_8bit(training, groups, next(iter(parameters.values())).device)
    if training.optim == "sgd":
        return torch.optim.SGD(groups, training.learning_rate, training.momentum)
    return torch.optim.AdamW(
        groups, training.learning_rate, (training.adam_beta1, training.adam_beta2), training.adam_epsilon
    )


def check_optimizer(training: TrainingConfig, device: torch.device) -> None:
    """Raise ConfigError where the optimiser cannot run at this site."""
    if training.optim != "adamw_bnb_8bit":
        return
    if device.type != "cuda":
        raise ConfigError(
            f"training.optim: adamw_bnb_8bit needs a CUDA device, but this site trains on {device.type}; "
            "use adamw_torch or adafactor.",
            kind="no-cuda",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "training.optim: adamw_bnb_8bit needs bitsandbytes; pip install 'quorate[quant]', or use "
            "adamw_torch or adafactor."
        )


def _adamw_8bit(
    training: TrainingConfig, groups: list[dict[str, Any]], device: torch.device
) -> torch.optim.Optimizer:
    """Return AdamW with moments in 8 bits; bitsandbytes keeps those of arrays below 4,096 numbers in 32.

    Moments are quantised in blocks within one array, and a site's array is an array of its own here, so
    stacked sites do not share blocks. Written from bitsandbytes' documentation; not run yet, for want of a
    CUDA device.
    """
    check_optimizer(training, device)
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(
        groups,
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
    )
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group its own share of `learning_rate`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["factor"]


def decayed(names: Iterable[str]) -> set[str]:
    """Return the arrays to which weight decay applies."""
    return {name for name in names if "bias" not in name.rpartition(".")[2]}


def _groups(
    training: TrainingConfig, parameters: Mapping[str, nn.Parameter], factors: Mapping[str, float]
) -> list[dict[str, Any]]:
    decays = decayed(parameters)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        factor, decay = factors[name], name in decays
        group = groups.setdefault(
            (factor, decay),
            {
                "params": [],
                "lr": training.learning_rate * factor,
                "weight_decay": training.weight_decay if decay else 0.0,
                "factor": factor,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())
