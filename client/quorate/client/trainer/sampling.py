"""Which of a site's training rows are used, and how often: few-shot subsets and balanced walks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from quorate.client.data.splits import stratum
from quorate.shared.config.run_config import RunConfig
from quorate.shared.seeds import rng
from quorate.shared.tasks.task import Row


def few_shot(run: RunConfig, site: str, rows: Sequence[Row]) -> Sequence[Row]:
    """Return the rows that `training.examples_per_class` leaves, in their order; all of them without it.

    They are drawn per label (for several labels at once: per set of labels; without labels: of all rows) by
    the seed and the site's name. A smaller number gives a subset of what a larger one gives.
    """
    count = run.training.examples_per_class
    if count is None:
        return rows
    members: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        members[stratum(row) if run.task.labels_each_row else ""].append(index)
    kept: list[int] = []
    for key, indices in members.items():
        order = rng(run.seed, "few-shot", site, key).permutation(len(indices))
        kept += [indices[i] for i in order[:count]]
    return [rows[index] for index in sorted(kept)]


@dataclass(frozen=True)
class BalancedWalk:
    """An endless walk in which every label of a site comes up equally often.

    It goes in laps. A lap takes each label once, in an order of its own, and of that label the next row of
    an endless walk through its reshuffled rows. The k-th row follows from (seed, site, k) alone.

    Args:
        members: rows of each label the site has; a row with several labels is a member of each.
    """

    members: Sequence[Sequence[int]]
    seed: int
    site: str

    @classmethod
    def over(cls, labels: Sequence[Sequence[int]], seed: int, site: str) -> BalancedWalk:
        """Return the walk over rows with these label ids; rows without any count as a label of their own."""
        members: dict[int, list[int]] = defaultdict(list)
        for row, ids in enumerate(labels):
            for label in ids or (-1,):
                members[label].append(row)
        return cls([members[label] for label in sorted(members)], seed, site)

    def rows(self, start: int) -> Iterator[int]:
        lap, offset = divmod(start, len(self.members))
        orders: dict[tuple[int, int], list[int]] = {}  # of one epoch of each label: a walk goes on in it
        while True:
            order = rng(self.seed, "labels", self.site, lap).permutation(len(self.members))
            for label in order[offset:].tolist():
                rows = self.members[label]
                epoch, place = divmod(lap, len(rows))
                if (label, epoch) not in orders:
                    orders.pop((label, epoch - 1), None)
                    draw = rng(self.seed, "order", self.site, "label", label, epoch)
                    orders[label, epoch] = draw.permutation(len(rows)).tolist()
                yield rows[orders[label, epoch][place]]
            lap, offset = lap + 1, 0
