"""Seeds for every random choice of a run, derived from the run's one seed.

Each choice names itself by a path (`"order", site, epoch`), so that no draw depends on how many draws
happened before it: a resumed run, a stacked run and a site alone all see the same numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, *path: str | int) -> int:
    """Derive an independent 63-bit seed for the choice named by `path`.

    Args:
        seed: the run's seed.
        path: what is drawn, for instance `("order", "north", 3)`.
    Returns: an integer in [0, 2**63), the first 8 bytes of a SHA-256 digest.
    """
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in path)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def rng(seed: int, *path: str | int) -> np.random.Generator:
    """Return a NumPy generator for the choice named by `path`."""
    return np.random.default_rng(derive_seed(seed, *path))
