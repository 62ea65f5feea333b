"""A site's rows: read, split where that is needed, and turned into the columns and labels of the run's task.

Messages name file, line and column. They may quote a label's value, never the text of a row.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from quorate.client.mapping import LABEL, LoadedRow, RowMapper
from quorate.client.readers import read_source
from quorate.shared.config.sites import SourceConfig, SplitConfig
from quorate.shared.messages import Split
from quorate.shared.seeds import rng
from quorate.shared.tasks.base import Kind, Row

log = logging.getLogger(__name__)

# Fewer rows of a label than this all go to train: a label that is only tested cannot be learnt.
_FEWEST_TO_SPLIT = 3


def load_splits(
    source: SourceConfig, base_dir: Path, task_columns: Mapping[str, Kind], labels: Sequence[str]
) -> dict[Split, list[LoadedRow]]:
    """Load a source's rows for a task.

    Args:
        source: where rows come from, and how their columns and labels become the task's.
        base_dir: where relative paths start.
        task_columns: columns every row must have, and what they hold afterwards.
        labels: the run's label names, in the order of their ids.
    Returns: rows of train, validation and test, each in file order. A split without a file is taken from the
        training rows by `source.split`; it may be empty, train never is.
    Raises: ConfigError: an unset variable, or a mapping to a column or label that the run does not have.
        DataError: missing, empty or damaged data; a row that lacks a column, a text or a label.
    """
    mapper = RowMapper(source, task_columns, labels)
    images = image_columns(source, task_columns)
    splits = {split: mapper.map(rows) for split, rows in read_source(source, base_dir, images).items()}
    return fill_missing_splits(splits, source.split)


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
    splits: dict[Split, list[LoadedRow]], split: SplitConfig
) -> dict[Split, list[LoadedRow]]:
    """Take the splits that have no file of their own from the training rows."""
    train = splits["train"]
    # The rows of a group stay in one split: a patient is not trained on and tested on.
    keys = [index if row.group is None else row.group for index, row in enumerate(train)]
    heads: dict[int | str, LoadedRow] = {}
    for key, row in zip(keys, train, strict=True):
        heads.setdefault(key, row)
    wanted: dict[Split, float] = {"validation": split.validation, "test": split.test}
    shares = {name: share for name, share in wanted.items() if name not in splits and share > 0}
    filled: dict[Split, list[LoadedRow]] = {"train": [], "validation": [], "test": []}
    filled |= {name: rows for name, rows in splits.items() if name != "train"}
    places = dict(zip(heads, _draw_splits(list(heads.values()), shares, split.seed), strict=True))
    for key, row in zip(keys, train, strict=True):
        filled[places[key]].append(row)
    if shares:
        counts = ", ".join(f"{name} {len(rows)}" for name, rows in filled.items())
        log.info("split by share, seed %d: %s", split.seed, counts)
    return filled


def _draw_splits(rows: Sequence[Row], shares: Mapping[Split, float], seed: int) -> list[Split]:
    """Draw a split for each row, so that every label has its share in every split to within a row or so.

    Rows are lined up label by label, in random order within each label, and each split takes every 1/share-th
    of those still free. The outcome depends on the seed, the labels and the order of rows alone.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        members[stratum(row)].append(index)
    line: list[int] = []
    for key in sorted(members):
        if len(members[key]) >= _FEWEST_TO_SPLIT:
            line.extend(rng(seed, "split", key).permutation(members[key]).tolist())
    places: list[Split] = ["train"] * len(rows)
    free, left = line, 1.0
    for name, share in shares.items():
        # Row i is taken where the running total, rounded, rises.
        totals = np.floor(np.arange(len(free) + 1) * (share / left) + 0.5)
        taken = np.diff(totals) > 0
        for index, take in zip(free, taken, strict=True):
            if take:
                places[index] = name
        free = [index for index, take in zip(free, taken, strict=True) if not take]
        left -= share
    return places
