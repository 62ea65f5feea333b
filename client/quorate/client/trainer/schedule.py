"""Learning-rate schedules over the whole run, and a site's data order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from quorate.client.trainer.sampling import BalancedWalk
from quorate.shared.config.run_config import TrainingConfig
from quorate.shared.seeds import rng


def lr_factor(config: TrainingConfig, step: int, total: int) -> float:
    """Return the factor on the peak learning rate at `step` (from 0) of `total` steps of the run.

    The same curves as `transformers.get_scheduler` for constant_with_warmup, linear and cosine.
    """
    asked = config.warmup_steps
    warmup = int(asked) if asked >= 1 else math.ceil(total * (asked or config.warmup_ratio))
    if step < warmup:
        return step / max(1, warmup)
    if config.lr_scheduler_type in ("constant", "constant_with_warmup"):
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    if config.lr_scheduler_type == "linear":
        return max(0.0, 1.0 - done)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))


@dataclass(frozen=True)
class BatchPlan:
    """Which rows a site trains on in one round: optimiser steps of micro-batches of row indices.

    The order is one endless walk through reshuffled epochs, a function of (seed, site) alone: round t starts
    where round t - 1 would have ended, whether or not the site took part in it. With `sampling: balanced` it
    is a BalancedWalk instead, in which an epoch is as many rows as the site has.
    """

    rows: int
    training: TrainingConfig
    seed: int
    site: str
    labels: Sequence[Sequence[int]] = ()
    """Label ids of each row, for `sampling: balanced`."""

    @property
    def rows_per_step(self) -> int:
        return self.training.per_device_train_batch_size * self.training.gradient_accumulation_steps

    @property
    def steps_per_round(self) -> int:
        if self.training.max_steps is not None:
            return self.training.max_steps
        return self.training.num_train_epochs * math.ceil(self.rows / self.rows_per_step)  # of each epoch

    def steps(self, round: int) -> list[list[list[int]]]:
        """Return the round's steps (round from 1), each a list of micro-batches of row indices."""
        if self.training.max_steps is None:
            first = (round - 1) * self.training.num_train_epochs
            epochs = range(first, first + self.training.num_train_epochs)
            # An epoch ends in a short step, with either way to sample, so that both take as many steps.
            batches = [
                chunk for epoch in epochs for chunk in _chunks(self._rows_of(epoch), self.rows_per_step)
            ]
        else:
            walk = self._walk((round - 1) * self.training.max_steps * self.rows_per_step)
            batches = [list(islice(walk, self.rows_per_step)) for _ in range(self.training.max_steps)]
        return [list(_chunks(batch, self.training.per_device_train_batch_size)) for batch in batches]

    def _rows_of(self, epoch: int) -> list[int]:
        if self.training.sampling == "balanced":
            return list(islice(self._walk(epoch * self.rows), self.rows))
        return self._epoch(epoch)

    def _epoch(self, epoch: int) -> list[int]:
        order: list[int] = rng(self.seed, "order", self.site, epoch).permutation(self.rows).tolist()
        return order

    def _walk(self, start: int) -> Iterator[int]:
        if self.training.sampling == "balanced":
            yield from BalancedWalk.over(self.labels, self.seed, self.site).rows(start)
        epoch, offset = divmod(start, self.rows)
        while True:
            yield from self._epoch(epoch)[offset:]
            epoch, offset = epoch + 1, 0


def _chunks(rows: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
