"""Secret randomness for differential privacy, for tensors."""

from __future__ import annotations

import secrets

import numpy as np
import torch
from torch import Tensor

from quorate.shared.privacy.secure_random import SecretSource


def with_noise(source: SecretSource, total: Tensor, std: float) -> Tensor:
    """Return `total` plus noise of standard deviation `std`, added in float64."""
    noise = torch.from_numpy(source.normal(total.numel()).reshape(total.shape)).to(total.device)
    return (total.double() + std * noise).to(total.dtype)


_WORDS, _WORDS_AT = 624, 24
"""Words of the Mersenne Twister, and the byte at which they begin in torch's state of a generator on the CPU:
8 bytes each, of which it uses 4 (ATen/CPUGeneratorImpl.cpp)."""


def secret_generator(device: torch.device) -> torch.Generator:
    """Return a generator of torch for dropout that starts from the operating system's secret numbers.

    Masks must not be known beforehand: which row gets which mask depends on the rows before it in the batch.
    On the CPU torch's own seeding takes 32 bits, so there the whole state is drawn; on a GPU (Philox) it
    takes all 64.
    """
    if device.type != "cpu":
        return torch.Generator(device).manual_seed(secrets.randbits(64))
    generator = torch.Generator(device).manual_seed(0)
    state = generator.get_state()
    words = np.frombuffer(secrets.token_bytes(4 * _WORDS), dtype=np.uint32).astype(np.uint64)
    state[_WORDS_AT : _WORDS_AT + 8 * _WORDS] = torch.from_numpy(words.view(np.uint8).copy())
    generator.set_state(state)
    return generator


def seed_secretly(device: torch.device) -> None:
    """Give the global generators of torch, on the CPU and on `device`, secret states."""
    torch.default_generator.set_state(secret_generator(torch.device("cpu")).get_state())
    if device.type == "cuda":
        torch.cuda.manual_seed(secrets.randbits(64))
