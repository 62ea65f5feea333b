"""What was read of a site's data before, so that a change is said in the log: how many rows, not which."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from quorate.client.site.data_source import SiteRows
from quorate.shared.protocol.messages import Split
from quorate.shared.tasks.task import Row

_Held = dict[Split, Counter[int]]


@dataclass
class RowChanges:
    """Rows of the reading before, as hashes of their content that mean nothing outside this process."""

    _before: dict[str, tuple[object, _Held]] = field(default_factory=dict)

    def describe(self, alias: str, key: object, rows: SiteRows) -> str:
        """Say how many rows there are, and what changed since they were read last.

        Args:
            key: what the rows were read for (columns, labels, source); rows of another key are not compared.
        """
        held: _Held = {split: Counter(map(_hash, each)) for split, each in rows.items()}
        read_for, before = self._before.get(alias, (None, held))
        self._before[alias] = key, held
        counts = ", ".join(f"{split} {len(each)}" for split, each in rows.items())
        if read_for != key:
            return counts
        changed = [
            f"{split} {fewer} fewer and {more} more"
            for split in held
            if (fewer := _total(before.get(split, Counter()) - held[split]))
            + (more := _total(held[split] - before.get(split, Counter())))
        ]
        return f"{counts}; since they were read last: {', '.join(changed) or 'nothing changed'}"


def _hash(row: Row) -> int:
    return hash((repr(sorted(row.values.items(), key=lambda item: item[0])), row.group))


def _total(counted: Counter[int]) -> int:
    return sum(counted.values())
