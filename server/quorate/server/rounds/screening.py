"""Step 4 of a round, where updates are held against each other: how far they moved, and what they weigh.

One site's figures say little by themselves. Next to the others' they show an update that moved absurdly far,
and a claim of rows that would outweigh everybody. The first needs a majority that is honest, and at least
three updates; below that those of the round before are counted in.

    bound     max_norm_ratio * max(median norm, start norm / 1000) * room    above it an update is set aside
    room      max(1, planned steps / median planned steps), 100 at most     by the rows that it joined with
    weight    min(own, c), c such that no share is above max_weight_share

The median is that of all updates, c that of all that count, whatever the order in which they came. An update
is still passed on as soon as nothing that may follow can change what becomes of it: norms that are missing
can lower the median no further than zeros would, and weights that are missing can only raise c.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from quorate.server.exchange.exclusions import exclusion
from quorate.server.tracking.records import Exclusion
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.config.run_config import RoundsConfig, TrainingConfig
from quorate.shared.protocol.messages import UpdateHeader

FEWEST = 3
"""Updates among which one that is unlike the others can be told."""
STILL = 1e-3
"""Part of the adapter's own norm by which a site may move however little the others did (times the ratio)."""
WIDEST = 100.0
"""Most room of a site that takes more steps than others; nobody can check how many rows it has."""
PAIR_SHARE = 0.9
"""Largest share of one of two sites; half would weigh all pairs equally."""


@dataclass(frozen=True)
class Passed:
    """An update that is good by itself.

    Args:
        site: whose.
        header: what it said.
        arrays: what it trained, padded to what the rule adds up.
        weight: that it counts with.
        norm: how far it moved, L2 [parameter units].
    """

    site: str
    header: UpdateHeader
    arrays: Adapter
    weight: float
    norm: float


@dataclass
class Screen:
    """Decides what becomes of a round's updates.

    Args:
        federation: max_norm_ratio and max_weight_share.
        asked: how many sites were asked.
        start_norm: L2 norm of the arrays that move, before the round [parameter units].
        before: norms of the updates that counted in the round before.
        room: site -> how many times the others' bound its own is (see `room`); 1 where it is left out.
    """

    federation: RoundsConfig
    asked: int
    start_norm: float
    before: Sequence[float]
    room: Mapping[str, float] = field(default_factory=dict)
    excluded: dict[str, Exclusion] = field(init=False, default_factory=dict)
    """Whom it set aside, and why; complete once all updates have passed."""
    norms: dict[str, float] = field(init=False, default_factory=dict)
    """Site -> norm, of every update that has come."""

    def see(self, update: Passed) -> None:
        """Take notice of an update that has come, before its turn."""
        self.norms[update.site] = update.norm

    def passed(self, arriving: Iterable[Passed]) -> Iterator[Passed]:
        """Yield those that count, with their weight, in the order of `arriving`.

        Holds the first half of the updates until more than that have come; then one only where it stands out.
        """
        held: list[Passed] = []
        weights: dict[str, float] = {}
        for each in arriving:
            held.append(each)
            self.see(each)
            weights[each.site] = each.weight
            while held and self._is_settled(held[0], weights):
                yield held.pop(0)
        bound = self._bound(list(self.norms.values()), 0)
        good = {site: weight for site, weight in weights.items() if not self._is_far(site, bound)}
        cap = largest_weight(good.values(), self.federation.max_weight_share)
        for each in held:
            if bound is not None and self._is_far(each.site, bound):
                self.excluded[each.site] = exclusion("norm", self._reason(each.site, bound))
            else:
                yield each if cap is None else replace(each, weight=min(each.weight, cap))

    def _is_settled(self, update: Passed, weights: Mapping[str, float]) -> bool:
        """Whether this update counts, with its own weight, whatever else comes."""
        site, weight = update.site, update.weight
        known = list(self.norms.values())
        if len(known) < FEWEST:
            return False
        bound = self._bound(known, self.asked - len(known))
        if self._is_far(site, bound):
            return False
        share = self.federation.max_weight_share
        if share is None:
            return True
        sure = [each for name, each in weights.items() if not self._is_far(name, bound)]
        return len(sure) >= FEWEST and weight <= share * sum(min(each, weight) for each in sure)

    def _bound(self, norms: Sequence[float], unknown: int) -> float | None:
        """Return the largest norm that counts, if `unknown` more norms were 0; None where nobody can tell."""
        ratio = self.federation.max_norm_ratio
        known = [*norms, *(self.before if len(norms) < FEWEST else ())]
        if ratio is None or len(known) < FEWEST:
            return None
        return ratio * max(float(np.median([*known, *[0.0] * unknown])), STILL * self.start_norm)

    def _is_far(self, site: str, bound: float | None) -> bool:
        return bound is not None and self.norms[site] > bound * self.room.get(site, 1.0)

    def _reason(self, site: str, bound: float) -> str:
        room = self.room.get(site, 1.0)
        return (
            f"moved {self.norms[site]:.4g} from where it started, where {bound * room:.4g} is "
            f"{self.federation.max_norm_ratio:g} times what sites usually move"
            f"{f' in as many steps ({room:.3g} times the usual)' if room > 1 else ''} "
            "(federation.max_norm_ratio; null lets it count)"
        )


def room(training: TrainingConfig, rows: Mapping[str, int]) -> dict[str, float]:
    """Return site -> how many times the others' bound its own is: whoever takes more steps moves further.

    Args:
        training: says the steps: max_steps, or as many batches as make num_train_epochs passes.
        rows: site -> training rows that it joined with, of all sites that were asked.
    """
    if training.max_steps is not None or not rows:
        return dict.fromkeys(rows, 1.0)
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    steps = {site: training.num_train_epochs * max(1, math.ceil(each / batch)) for site, each in rows.items()}
    usual = float(np.median(list(steps.values())))
    return {site: min(max(1.0, each / usual), WIDEST) for site, each in steps.items()}


def largest_weight(weights: Iterable[float], share: float | None) -> float | None:
    """Return c such that min(w, c) is at most `share` of the sum of all min(w, c); None where all w are.

    With fewer sites than can have so little each, c is the smallest weight: all are equal.
    """
    descending = sorted(weights, reverse=True)
    if share is None or len(descending) < 2:
        return None
    if len(descending) < FEWEST:
        share = max(share, PAIR_SHARE)
    for capped, largest in enumerate(descending):
        rest = sum(descending[capped:])
        left = 1 - share * capped
        if left <= 0:
            return descending[-1]
        if largest * left <= share * rest:  # c reaches at least this one
            return None if capped == 0 else share * rest / left
    return descending[-1]
