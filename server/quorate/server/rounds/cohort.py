"""Step 1 of a round: which sites are asked to train."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from quorate.server.exchange.join import Members
from quorate.server.rounds.run import Run
from quorate.shared.seeds import derive_seed, rng


def choose_cohort(run: Run, members: Members, round: int) -> tuple[str, ...]:
    """Return the sites asked in `round`: all of them, or `sites_per_round` drawn by the seed."""
    names = sorted(members.nodes)
    wanted = run.config.federation.sites_per_round
    if wanted is None or wanted >= len(names):
        return tuple(names)
    return tuple(sorted(rng(run.config.seed, "cohort", round).choice(names, wanted, replace=False).tolist()))


def poisson_cohort(names: Iterable[str], probability: float, round: int, seed: int | None) -> tuple[str, ...]:
    """Return the sites drawn for `round`, each by a coin of its own; there may be none.

    Args:
        round: from 1.
        seed: throws the coins so that anyone who knows it can tell; None for secret ones.
    """
    return tuple(name for name in sorted(names) if _heads(probability, round, name, seed))


def _heads(probability: float, round: int, name: str, seed: int | None) -> bool:
    bits = secrets.randbits(63) if seed is None else derive_seed(seed, "coin", round, name)
    return bits < probability * 2.0**63
