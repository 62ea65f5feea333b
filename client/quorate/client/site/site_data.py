"""What one site holds, as its site.yaml says: rows for a run, their price in privacy, and the base model."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from quorate.client.data.changes import RowChanges
from quorate.client.data.run_rows import read_rows
from quorate.client.data.split_key import SiteSplits, look_at_splits, open_splits
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
from quorate.shared.errors import BadInput
from quorate.shared.privacy.privacy_event import PrivacyEvent
from quorate.shared.tasks.task import Row

log = logging.getLogger(__name__)


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
                raise type(error)(f"{where}: {error}") from error
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

    def at_hand(self, run: RunConfig) -> RunConfig:
        return model_at_site(run, self.folder.config, self.folder.path)
