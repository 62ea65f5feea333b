"""A site's rows: read, split where that is needed, and turned into the columns and labels of the run's task.

Messages name file, line and column. They may quote a label's value, never the text of a row.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quorate.client.readers import describe_columns, read_source
from quorate.shared.config.sites import SourceConfig, SplitConfig
from quorate.shared.errors import ConfigError, DataError
from quorate.shared.messages import Split
from quorate.shared.seeds import rng
from quorate.shared.tasks.base import Row
from quorate.shared.template import TextTemplate, is_missing, is_text

log = logging.getLogger(__name__)

LABEL, TEXT = "label", "text"
# Fewer rows of a label than this all go to train: a label that is only tested cannot be learnt.
_FEWEST_TO_SPLIT = 3


@dataclass(frozen=True)
class LoadedRow(Row):
    """A row with the task's columns in `values`, and the columns it came from."""

    raw: Mapping[str, Any]
    """All columns of the data, for partitions by column; never given to a task."""


def load_splits(
    source: SourceConfig, base_dir: Path, task_columns: tuple[str, ...], labels: Sequence[str]
) -> dict[Split, list[LoadedRow]]:
    """Load a source's rows for a task.

    Args:
        source: where rows come from, and how their columns and labels become the task's.
        base_dir: where relative paths start.
        task_columns: columns every row must have; `label` holds an id (or a list of ids) afterwards.
        labels: the run's label names, in the order of their ids.
    Returns: rows of train, validation and test, each in file order. A split without a file is taken from the
        training rows by `source.split`; it may be empty, train never is.
    Raises: ConfigError: an unset variable, or a mapping to a column or label that the run does not have.
        DataError: missing, empty or damaged data; a row that lacks a column, a text or a label.
    """
    mapper = _Mapper(source, task_columns, labels)
    splits = {split: mapper.map(rows) for split, rows in read_source(source, base_dir).items()}
    return _fill_missing_splits(splits, source.split)


def stratum(row: Row) -> str:
    """Return what a row is stratified by: its label, its set of labels, or nothing."""
    label = row.values.get(LABEL)
    return ",".join(map(str, sorted(set(label)))) if isinstance(label, list) else str(label)


def _fill_missing_splits(
    splits: dict[Split, list[LoadedRow]], split: SplitConfig
) -> dict[Split, list[LoadedRow]]:
    """Take the splits that have no file of their own from the training rows."""
    train = splits["train"]
    wanted: dict[Split, float] = {"validation": split.validation, "test": split.test}
    shares = {name: share for name, share in wanted.items() if name not in splits and share > 0}
    filled: dict[Split, list[LoadedRow]] = {"train": [], "validation": [], "test": []}
    filled |= {name: rows for name, rows in splits.items() if name != "train"}
    for row, place in zip(train, _draw_splits(train, shares, split.seed), strict=True):
        filled[place].append(row)
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


class _Mapper:
    """Turns raw rows into rows of the task."""

    def __init__(self, source: SourceConfig, task_columns: tuple[str, ...], labels: Sequence[str]) -> None:
        self.columns = {name: source.columns.get(name, name) for name in task_columns}
        if unknown := sorted(set(source.columns) - set(task_columns)):
            raise ConfigError(
                f"columns.{unknown[0]}: the task has no such column; it has {', '.join(task_columns)}."
            )
        self.template = TextTemplate.parse(source.template) if source.template is not None else None
        if self.template is not None and self.columns.pop(TEXT, None) is None:
            raise ConfigError("template builds a text, but the task has no column `text`; leave it out.")
        self.labels = _Labels(source.labels, labels)

    def map(self, rows: Sequence[Row]) -> list[LoadedRow]:
        """Map the rows of one split.

        Raises: DataError: a column that no row has, or a row that lacks something.
        """
        known = dict.fromkeys(name for row in rows for name in row.values)
        needed = [*self.columns.values(), *(self.template.columns if self.template else ())]
        for column in needed:
            if column not in known:
                raise DataError(
                    f"{rows[0].source}: column {column!r} is missing here and in every other row; the data "
                    f"have: {describe_columns(known)}. Map it with `columns`, or correct the template."
                )
        return [self._row(row) for row in rows]

    def _row(self, row: Row) -> LoadedRow:
        values: dict[str, Any] = {}
        if self.template is not None:
            values[TEXT] = self.template.render(row.values, row.source)
        for name, column in self.columns.items():
            if column not in row.values:
                raise DataError(
                    f"{row.source}: column {column!r} is missing; this row has: "
                    f"{describe_columns(row.values)}. Fill it in or remove the row."
                )
            values[name] = row.values[column]
        for name, value in values.items():
            where = f"{row.source}: column {self.columns.get(name, name)!r}"
            if name == LABEL:
                values[name] = self.labels.ids(value, where)
            elif is_missing(value):
                raise DataError(f"{where} is empty; fill it in or remove the row.")
            elif name == TEXT and not isinstance(value, str):
                raise DataError(
                    f"{where} holds a {type(value).__name__}, not a text; "
                    "use `template` to write texts from columns."
                )
            elif name == TEXT and not is_text(value):
                raise DataError(
                    f"{where} holds half of a character (a lone \\ud800 to \\udfff); the text was cut there: "
                    "mend it or remove the row."
                )
        return LoadedRow(values, row.source, row.values)


class _Labels:
    """From a value in the data to a label's id."""

    def __init__(self, mapping: Mapping[str, str], labels: Sequence[str]) -> None:
        self.names = tuple(labels)
        self.mapping = mapping
        self.index = {name: index for index, name in enumerate(labels)}
        for value, label in mapping.items():
            if label not in self.index:
                raise ConfigError(
                    f"labels: {value!r} is mapped to {label!r}, which the run does not list; "
                    f"{self._listed()} Correct the mapping, or add the label to task.labels of the run file."
                )

    def ids(self, value: Any, where: str) -> int | list[int]:
        """Return the id of a label, or the ids of a list of labels (JSON in a CSV cell)."""
        if isinstance(value, str) and value.lstrip().startswith("[") and value not in self.index:
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                raise DataError(
                    f'{where}: the list of labels is not JSON; write ["one", "two"] in the cell.'
                ) from None
        if isinstance(value, (list, tuple)):
            return sorted({self._id(item, where) for item in value})
        return self._id(value, where)

    def _id(self, value: Any, where: str) -> int:
        if is_missing(value):
            raise DataError(f"{where} has no label; fill it in or remove the row.")
        key = _as_key(value)
        if key in self.mapping:
            return self.index[self.mapping[key]]
        number = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else None
        if key in self.index:
            if number not in (None, self.index[key]):
                raise DataError(
                    f"{where}: {key} may be the label of that name or label number {key} counted from 0; "
                    f"say which with `labels: {{{key}: ...}}` for each value."
                )
            return self.index[key]
        # A mapping that leaves a number out says nothing of it; to take it for an id would be a guess.
        if number is not None and number < len(self.names) and not any(k.isdigit() for k in self.mapping):
            return number
        shown = key if len(key) <= 60 else f"a value of {len(key)} characters"
        raise DataError(
            f"{where}: label {shown!r} is not among the run's labels; {self._listed()} "
            "Map it with `labels`, correct it, or remove the row."
        )

    def _listed(self) -> str:
        more = f" and {len(self.names) - 12} more" if len(self.names) > 12 else ""
        return f"its labels are {', '.join(self.names[:12])}{more}."


def _as_key(value: Any) -> str:
    """Write a label's value as `labels` of a sites file does: 1.0 as 1, truth values as JSON has them."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()
