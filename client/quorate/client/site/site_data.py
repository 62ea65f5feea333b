"""What one site holds, as its site.yaml says: rows for a run, their price in privacy, and the base model."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from quorate.client.data.mapping import LoadedRow
from quorate.client.data.split_key import SiteSplits, look_at_splits, open_splits
from quorate.client.data.splits import image_columns, load_splits, measured_apart
from quorate.client.models.base_models import at_site as model_at_site
from quorate.client.node.folder import SiteFolder
from quorate.client.policy.gate import check_rows, check_steps
from quorate.client.privacy.budgets import Spending, spending
from quorate.client.privacy.units import groups_of, plan_of
from quorate.client.site.data_source import SiteRows
from quorate.client.site.request_checks import BaseLimits
from quorate.client.trainer.sampling import few_shot
from quorate.shared.config.privacy_config import SitePrivacy
from quorate.shared.config.run_config import RunConfig
from quorate.shared.config.sites_config import SourceConfig
from quorate.shared.errors import BadInput
from quorate.shared.privacy.privacy_event import PrivacyEvent
from quorate.shared.protocol.messages import Split
from quorate.shared.tasks.task import Row

log = logging.getLogger(__name__)


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
            if (fewer := (before.get(split, Counter()) - held[split]).total())
            + (more := (held[split] - before.get(split, Counter())).total())
        ]
        return f"{counts}; since they were read last: {', '.join(changed) or 'nothing changed'}"


@dataclass
class SiteData:
    """What one site holds, as its site.yaml says (quorate.client.site.data_source.DataSource).

    Rows are read when a run that was let through first asks for them, and kept until a run asks for others,
    or until one begins (`forget`).

    Args:
        folder: the site's; replaced by whoever reads site.yaml again.
        looks_only: whether nothing is to be written, as by commands that another user may give.
    """

    folder: SiteFolder
    looks_only: bool = False
    readings: int = 0
    _rows: dict[tuple[object, ...], SiteRows] = field(default_factory=dict)
    _units: dict[tuple[object, ...], set[bytes]] = field(default_factory=dict)
    _seen: RowChanges = field(default_factory=RowChanges)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.folder.connection.site,)

    def rows(self, run: RunConfig, site: str) -> SiteRows:
        key = self._key(run)
        if key not in self._rows:
            self.forget()  # before the next ones take their memory
            where = f"site.yaml, data.{run.data}"
            try:
                source, held = self.folder.config.data[run.data], self._splits()
                splits, units = read_rows(run, source, self.folder.path, held)
            except BadInput as error:
                raise type(error)(f"{where}: {error}", kind=error.kind) from error
            self._units = {key: units}
            self._rows[key] = {
                split: [Row(row.values, row.source, group=row.group) for row in rows]
                for split, rows in splits.items()
            }
            log.info("%s: %s", where, self._seen.describe(run.data, key, self._rows[key]))
        rows = self._rows[key]
        check_rows(self.folder.config, run.data, len(rows["train"]))
        if run.training.max_steps is None:
            used = few_shot(run, site, rows["train"])
            check_steps(self.folder.config, run, len(set(groups_of(run, site, used) or range(len(used)))))
        return rows

    def _key(self, run: RunConfig) -> tuple[object, ...]:
        # Not every task has labels; those that have list them under this name.
        labels: tuple[str, ...] = getattr(run.task, "labels", ())
        unit = run.privacy.unit if isinstance(run.privacy, SitePrivacy) else None
        source = self.folder.config.data[run.data].model_dump_json()
        return run.data, tuple(run.task.columns.items()), labels, source, unit

    def _splits(self) -> SiteSplits | None:
        """Return how rows are placed; None for who only looks at a site that has never read any."""
        return look_at_splits(self.folder) if self.looks_only else open_splits(self.folder)

    def write_down(self, run: RunConfig) -> None:
        """Keep for good which rows a private run is about to be trained on: they are not measured again.

        Raises: as `rows`; OutputError: it could not be written.
        """
        (name,) = self.names
        self.rows(run, name)
        open_splits(self.folder).write_down(self._units[self._key(run)])

    def use(self, folder: SiteFolder) -> None:
        """Take over site.yaml as it is now."""
        self.folder = folder

    def forget(self) -> None:
        """Have the rows read again when they are next asked for: a run begins."""
        self._rows.clear()
        self.readings += 1

    def spending(self, run: RunConfig) -> Spending:
        """Return what a run with record- or group-level privacy costs here.

        Raises: as `rows`; ConfigError, DataError: of `plan_of`.
        """

        def event_of(run: RunConfig) -> PrivacyEvent:
            (name,) = self.names
            plan = plan_of(run, name, self.rows(run, name)["train"])
            assert plan is not None, "only asked for private runs"
            return plan.event()

        return spending(run, self.folder.config, self.folder.path, event_of)

    @property
    def base_limits(self) -> BaseLimits:
        policy = self.folder.config.policy
        return BaseLimits(policy.max_residual_rank, policy.max_base_change)

    @property
    def fewest_for_statistics(self) -> int | None:
        """Fewest rows over which sums leave, as site.yaml says."""
        return self.folder.config.policy.min_rows_for_statistics

    def at_hand(self, run: RunConfig) -> RunConfig:
        return model_at_site(run, self.folder.config, self.folder.path)


def read_rows(
    run: RunConfig, source: SourceConfig, base_dir: Path, held: SiteSplits | None
) -> tuple[dict[Split, list[LoadedRow]], set[bytes]]:
    """Read the rows that a run uses at a site.

    Args:
        held: how rows are placed; None where nobody knows yet, see `look_at_splits`.
    Returns: its splits, without measured rows that a private run was trained on; and the digests of what is
        trained on, of a run with record- or group-level privacy.
    Raises: ConfigError, DataError: as `load_splits`. OutputError: the book of what was trained on.
    """
    # Not every task has labels; those that have list them under this name.
    labels: tuple[str, ...] = getattr(run.task, "labels", ())
    images = image_columns(source, run.task.columns)
    splits = load_splits(source, base_dir, run.task.columns, labels, held.placing if held else None)
    if held is None:
        return splits, set()
    if held.knows_none(splits, images):
        log.error(
            "data.%s: private runs were trained at this site, and on none of these rows. Where these are the "
            "same people's with a column more, less or changed in each row, they are new rows to the splits, "
            "and what was trained on may be measured: see docs/data.md (Splits)",
            run.data,
        )
    splits, left = held.leave_out_trained(splits, images)
    if left:
        log.warning("data.%s: %d measured rows are left out: a private run had them", run.data, left)
    if not isinstance(run.privacy, SitePrivacy):
        return splits, set()
    return measured_apart(splits, held.placing, images, by_group=run.privacy.unit == "group")


_Held = dict[Split, Counter[int]]


def _hash(row: Row) -> int:
    return hash((repr(sorted(row.values.items(), key=lambda item: item[0])), row.group))
