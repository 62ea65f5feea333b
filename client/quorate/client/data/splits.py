"""A site's rows: read, split where that is needed, and turned into the columns and labels of the run's task.

Messages name file, line and column. They may quote a label's value, never the text of a row.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from quorate.client.data.mapping import LABEL, LoadedRow, RowMapper
from quorate.client.data.placement import Placement, place
from quorate.client.data.readers import read_source
from quorate.shared.config.sites_config import SourceConfig, SplitConfig
from quorate.shared.errors import DataError
from quorate.shared.protocol.messages import Split
from quorate.shared.tasks.task import Kind, Row

log = logging.getLogger(__name__)


def load_splits(
    source: SourceConfig,
    base_dir: Path,
    task_columns: Mapping[str, Kind],
    labels: Sequence[str],
    placing: Placement | None = None,
) -> dict[Split, list[LoadedRow]]:
    """Load a source's rows for a task.

    Args:
        task_columns: columns every row must have, and what they hold afterwards.
        labels: the run's label names, in the order of their ids.
        placing: says where rows lie; left out, it follows from the seed, as at simulated sites.
    Returns: rows of train, validation and test, each in file order. A split without a file is taken from the
        training rows by `source.split`; it may be empty, train never is.
    Raises: ConfigError: an unset variable, or a mapping to a column or label that the run does not have.
        DataError: missing, empty or damaged data; a row that lacks a column, a text or a label.
    """
    mapper = RowMapper(source, task_columns, labels)
    images = image_columns(source, task_columns)
    splits = {split: mapper.map(rows) for split, rows in read_source(source, base_dir, images).items()}
    return fill_missing_splits(splits, source.split, placing or Placement.of_seed(source.split.seed), images)


def image_columns(source: SourceConfig, task_columns: Mapping[str, Kind]) -> list[str]:
    """Return the columns of the data that hold images."""
    return [source.columns.get(name, name) for name, kind in task_columns.items() if kind == "image"]


def stratum(row: Row) -> str:
    """Return what a row is stratified by: its label, its set of labels, or nothing."""
    label = row.values.get(LABEL)
    if isinstance(label, list):
        return ",".join(map(str, sorted(set(label))))
    return str(label) if isinstance(label, int) else ""


def fill_missing_splits(
    splits: Mapping[Split, list[LoadedRow]],
    split: SplitConfig,
    placing: Placement,
    images: Sequence[str] = (),
) -> dict[Split, list[LoadedRow]]:
    """Take the splits that have no file of their own from the training rows.

    Args:
        splits: rows of each split that the source has; `train` is always there.
        split: the shares; that of a split with a file of its own stays in training.
        images: columns of the data that hold images.
    Raises: DataError: no row is left to train on.
    """
    filled: dict[Split, list[LoadedRow]] = {"train": [], "validation": [], "test": []}
    filled |= {name: rows for name, rows in splits.items() if name != "train"}
    wanted: dict[Split, float] = {"validation": split.validation, "test": split.test}
    made = [name for name, share in wanted.items() if name not in splits and share > 0]
    train = splits["train"]
    if not made:
        return {**filled, "train": list(train)}
    for row, side in zip(train, place(train, split, placing, images), strict=True):
        filled[side if side in made else "train"].append(row)
    counts = ", ".join(f"{name} {len(rows)}" for name, rows in filled.items())
    log.info("split by a keyed hash of each row: %s", counts)
    if train and not filled["train"]:
        raise DataError(
            f"all {len(train)} rows lie in validation and test, and none is left to train on: each row (or "
            "group) is placed by itself, so few of them may all lie on one side; give more rows, lower the "
            "shares in `split`, or give files for the splits.",
            kind="nothing-to-train-on",
        )
    if len(train) > 1 and (empty := [name for name in made if not filled[name]]):
        log.warning(
            "no row of %d lies in %s: each is placed by itself, so a small share of few rows may be none",
            len(train),
            " and ".join(empty),
        )
    return filled


def measured_apart(
    splits: Mapping[Split, Sequence[LoadedRow]], placing: Placement, images: Sequence[str], *, by_group: bool
) -> tuple[dict[Split, list[LoadedRow]], set[bytes]]:
    """Leave out of the training rows what is measured too, for a run that protects them.

    Its figures on measured rows are exact, so a row of these cannot be protected, and neither can its double
    in the training rows. To leave the double out of training changes nothing for who watches: with it and
    without it the same rows are trained on and measured. To leave the measured one out would show it.

    Args:
        images: columns of the data that hold images.
        by_group: whether the run protects groups.
    Returns: all splits, and the digests of the rows (and groups) that are left to train on.
    """
    measured = {
        placing.units(row, images)[0] for name, rows in splits.items() if name != "train" for row in rows
    }
    train, units = [], set[bytes]()
    for row in splits["train"]:
        digests = placing.units(row, images)
        if digests[0] not in measured:
            train.append(row)
            units.update(digests if by_group else digests[:1])
    if left := len(splits["train"]) - len(train):
        log.warning("%d training rows are among the measured ones; they are not trained on", left)
    return {**{name: list(rows) for name, rows in splits.items()}, "train": train}, units
