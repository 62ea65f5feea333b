"""Secret randomness for differential privacy: noise and batches that nobody can draw again.

Nothing here derives from the run's seed, which everybody in the run knows. A generator of torch on the CPU is
no secret either: it takes 32 bits of its seed, which anyone can try out (`manual_seed(5)` and
`manual_seed(5 + 2**32)` draw the same numbers). So numbers are drawn from the key stream of AES-256 in
counter mode, which cannot be told from chance even by someone who sees part of it, or, with `secure_rng:
false`, by NumPy's PCG64 from 128 bits of the operating system's.
"""

from __future__ import annotations

import math
import secrets
from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

Floats = npt.NDArray[np.float64]
_CHUNK = 8192
"""Normal numbers made at a time: what lies between stays in a processor's cache."""


class SecretSource(ABC):
    """A source of numbers that starts from the operating system's secret ones."""

    @abstractmethod
    def uniform(self, count: int) -> Floats:
        """Return numbers from [0, 1), [count], each a multiple of 2**-53."""

    @abstractmethod
    def normal(self, count: int) -> Floats:
        """Return standard normal numbers, [count]."""

    def subset(self, size: int, of: int) -> list[int]:
        """Return `size` different indices below `of` (all of them where there are fewer), drawn evenly."""
        return [int(index) for index in np.argsort(self.uniform(of), kind="stable")[:size]]


class SeededSource(SecretSource):
    """NumPy's PCG64, seeded with 128 bits of the operating system's."""

    def __init__(self) -> None:
        self._draw = np.random.Generator(np.random.PCG64(secrets.randbits(128)))

    def uniform(self, count: int) -> Floats:
        return self._draw.random(count)

    def normal(self, count: int) -> Floats:
        return self._draw.standard_normal(count)


class CipherSource(SecretSource):
    """The key stream of AES-256-CTR under a key of the operating system's.

    A normal number is the sum of four by Box and Muller's method over 2, as in Opacus' secure mode: the last
    bits of one float64 draw tell which input it came from, and with it the sum that it was added to (Mironov
    2012; Holohan and Braghin 2021, arXiv:2107.10138, section 5.1).
    """

    def __init__(self) -> None:
        key, start = secrets.token_bytes(32), secrets.token_bytes(16)
        self._stream = Cipher(algorithms.AES(key), modes.CTR(start)).encryptor()

    def uniform(self, count: int) -> Floats:
        words = np.frombuffer(self._stream.update(bytes(8 * count)), dtype=np.uint64)
        found: Floats = np.multiply(words >> np.uint64(11), 2.0**-53, dtype=np.float64)
        return found

    def normal(self, count: int) -> Floats:
        parts = [self._normal(min(_CHUNK, count - at)) for at in range(0, count, _CHUNK)]
        return np.concatenate(parts) if parts else np.empty(0)

    def _normal(self, count: int) -> Floats:
        radius = np.sqrt(-2 * np.log1p(-self.uniform(2 * (count + 1))))
        angle = 2 * math.pi * self.uniform(2 * (count + 1))
        cosines, sines = (radius * np.cos(angle)).reshape(2, -1), (radius * np.sin(angle)).reshape(2, -1)
        # Both numbers of a pair are used, but never in one sum.
        total: Floats = (cosines[:, :-1] + sines[:, 1:]).sum(axis=0) / 2
        return total


def secret_source(secure: bool) -> SecretSource:
    """Return a new source, the cryptographic one for `secure`."""
    return CipherSource() if secure else SeededSource()
