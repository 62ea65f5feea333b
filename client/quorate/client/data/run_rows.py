"""A site's rows for one run: read, placed, and kept apart where a run protects what it is trained on."""

from __future__ import annotations

import logging
from pathlib import Path

from quorate.client.data.mapping import LoadedRow
from quorate.client.data.split_key import SiteSplits
from quorate.client.data.splits import image_columns, load_splits, measured_apart
from quorate.shared.config.privacy_config import SitePrivacy
from quorate.shared.config.run_config import RunConfig
from quorate.shared.config.sites_config import SourceConfig
from quorate.shared.protocol.messages import Split

log = logging.getLogger(__name__)


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
