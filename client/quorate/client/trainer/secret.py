"""Secret randomness for differential privacy, for tensors."""

from __future__ import annotations

import secrets

import torch
from torch import Tensor

from quorate.shared.privacy.secret import SecretSource


def with_noise(source: SecretSource, total: Tensor, std: float) -> Tensor:
    """Return `total` plus noise of standard deviation `std`, added in float64."""
    noise = torch.from_numpy(source.normal(total.numel()).reshape(total.shape)).to(total.device)
    return (total.double() + std * noise).to(total.dtype)


def secret_generator(device: torch.device) -> torch.Generator:
    """Return a generator of torch for dropout, seeded by the operating system.

    Masks must not be known beforehand: which row gets which mask depends on the rows before it in the batch.
    """
    return torch.Generator(device).manual_seed(secrets.randbits(63))
