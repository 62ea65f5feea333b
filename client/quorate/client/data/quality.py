"""What a site should know of its own data before anything is trained: a report that never quotes a row.

Unlike loading for a run it does not stop at the first bad row: it names some, counts the rest, and looks at
what can be used. Rows are named as `file:line`; names of columns and labels are the only words of the data
that it repeats.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quorate.client.data.duplicates import TARGETS, groups, input_key, near_rows, repeats
from quorate.client.data.mapping import LABEL, LoadedRow, RowMapper
from quorate.client.data.placement import Placement
from quorate.client.data.quality_rules import INSPECTORS, Finding, Report, warning
from quorate.client.data.readers import read_source
from quorate.client.data.splits import fill_missing_splits, image_columns
from quorate.shared.config.sites_config import SourceConfig
from quorate.shared.config.template import is_missing
from quorate.shared.errors import DataError
from quorate.shared.protocol.messages import Split
from quorate.shared.tasks.task import Row, Task

MOST_NAMED = 20
"""Bad rows that are named; the rest is counted."""
_SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_PLACEHOLDERS = frozenset({"na", "n/a", "nan", "null", "none", "nil", "?", "-", "--", "unknown", "missing"})


class ColumnReport(Report):
    """One column of the data as they are, over all splits."""

    missing: int
    """Rows without a value: the column is absent, null, NaN or blank."""
    placeholders: int
    """Rows whose value says that there is none: `n/a`, `unknown`, `?`, ..."""


class SourceReport(Report):
    """One source: what a site's own file or folder holds, or what all simulated sites share."""

    name: str
    """The site, or the data alias where the source is shared out over sites."""
    rows: dict[Split, int]
    """Rows read, usable or not."""
    columns: dict[str, ColumnReport]
    unusable: int
    """Rows that a run would refuse."""
    problems: list[str]
    """The first of them: where, and what is wrong."""


class SplitReport(Report):
    """The usable rows of one split of one site."""

    rows: int
    labels: dict[str, int]
    """Rows (for tags: words; for objects: boxes) with each label; empty where there are no labels."""
    duplicates: int
    """Rows whose input another row of the split before it has, too."""
    near_duplicates: int
    """Further rows that are nearly the same as one before."""
    facts: dict[str, dict[str, Any]]
    """What is particular to the kinds of column: lengths of texts, ranges of numbers, sizes of images."""


class Overlap(Report):
    """Rows of one split whose input is in another one: what is tested was trained on."""

    exact: int
    near: int


class SiteReport(Report):
    """One site."""

    name: str
    splits: dict[Split, SplitReport]
    """Each split that has rows."""
    overlaps: dict[str, Overlap]
    """`test in train`, `validation in train`, `test in validation`."""
    disagreeing: int
    """Rows with the input of another row and another target."""
    findings: list[Finding]
    """What to look at, errors first."""


def read_all(
    source: SourceConfig, base_dir: Path, task: Task, name: str, placing: Placement | None = None
) -> tuple[dict[Split, list[LoadedRow]], SourceReport]:
    """Read a source and keep the rows that can be used.

    Args:
        placing: says where rows lie, see `load_splits`.
    Returns: usable rows per split, as a run would have them, and what there is to say of all rows.
    Raises: ConfigError, DataError: no row of it can be read: no such file, no header, no such column.
    """
    problems: list[str] = []

    def refuse(error: DataError) -> None:
        problems.append(str(error))

    mapper = RowMapper(source, task.columns, getattr(task, "labels", ()))
    images = image_columns(source, task.columns)
    raw = read_source(source, base_dir, images, refuse)
    mapped = {split: mapper.map(rows, refuse) for split, rows in raw.items()}
    report = SourceReport(
        name=name,
        rows={split: len(rows) for split, rows in raw.items()},
        columns=_columns([row for rows in raw.values() for row in rows]),
        unusable=len(problems),
        problems=problems[:MOST_NAMED],
    )
    placing = placing or Placement.of_seed(source.split.seed)
    return fill_missing_splits(mapped, source.split, placing, images), report


def inspect_site(name: str, rows: Mapping[Split, Sequence[Row]], task: Task, processor: Any) -> SiteReport:
    """Look at the usable rows of one site.

    Args:
        rows: split -> rows with the task's columns.
        processor: the model's tokenizer; None leaves lengths in tokens out.
    """
    findings: list[Finding] = []
    present = {split: list(rows[split]) for split in _SPLITS if rows.get(split)}
    if "train" not in present:
        findings.append(Finding(level="error", text="no training rows"))
    facts: dict[Split, dict[str, dict[str, Any]]] = {split: {} for split in present}
    for kind in dict.fromkeys(task.columns.values()):
        columns = [column for column, each in task.columns.items() if each == kind]
        for split, members in present.items():
            if kind in INSPECTORS:
                found, more = INSPECTORS[kind](columns, members, task, processor)
                facts[split].update({key: value for key, value in found.items() if value})
                findings += [each.model_copy(update={"text": f"{split}: {each.text}"}) for each in more]
    labels = {split: _label_mix(members, task) for split, members in present.items()}
    findings += _label_findings(labels)
    everything = [(split, row) for split, members in present.items() for row in members]
    near = near_rows(everything, task)
    keys = [input_key(row, task) for _, row in everything]
    counted = repeats([split for split, _ in everything], keys, near)
    overlaps = _overlaps(everything, keys, near, findings)
    disagreeing = _disagreements(everything, keys, task, findings)
    splits = {
        split: SplitReport(
            rows=len(members),
            labels=labels[split],
            duplicates=counted[split][0],
            near_duplicates=counted[split][1],
            facts=facts[split],
        )
        for split, members in present.items()
    }
    findings.sort(key=lambda each: each.level != "error")
    return SiteReport(name=name, splits=splits, overlaps=overlaps, disagreeing=disagreeing, findings=findings)


def _columns(rows: Sequence[Row]) -> dict[str, ColumnReport]:
    missing: Counter[str] = Counter()
    held: Counter[str] = Counter()
    for row in rows:
        for column in row.values:
            missing[column] += not is_missing(row.values[column])
            held[column] += _says_nothing(row.values[column])
    return {
        column: ColumnReport(missing=len(rows) - there, placeholders=held[column])
        for column, there in missing.items()
    }


def _says_nothing(value: Any) -> bool:
    return isinstance(value, str) and value.strip().casefold() in _PLACEHOLDERS


def _label_mix(rows: Sequence[Row], task: Task) -> dict[str, int]:
    names: tuple[str, ...] = getattr(task, "labels", ())
    columns = [column for column, kind in task.columns.items() if kind in ("label", "tags", "objects")]
    if not names or not columns:
        return {}
    counts: Counter[int] = Counter()
    for row in rows:
        value = row.values[columns[0]]
        for each in value if isinstance(value, list | tuple) else [value]:
            counts[each[0] if isinstance(each, list | tuple) else each] += 1
    return {name: counts[index] for index, name in enumerate(names)}


def _label_findings(labels: Mapping[Split, Mapping[str, int]]) -> list[Finding]:
    found = []
    train = labels.get("train", {})
    if absent := [name for name, count in train.items() if not count]:
        found.append(warning(f"train: no row of {_listed(absent)}, so this site cannot teach it"))
    for split, counts in labels.items():
        total, most = sum(counts.values()), max(counts.values(), default=0)
        if split != "train" and (untaught := [k for k, n in counts.items() if n and not train.get(k)]):
            found.append(warning(f"{split}: has rows of {_listed(untaught)}, train has none"))
        if total and len(counts) > 1 and most / total > 0.95:
            name = next(key for key, count in counts.items() if count == most)
            found.append(warning(f"{split}: {100 * most / total:.0f} % of the labels are {name}"))
    return found


def _overlaps(
    rows: Sequence[tuple[Split, Row]],
    keys: Sequence[str | None],
    near: Sequence[tuple[int, int]],
    findings: list[Finding],
) -> dict[str, Overlap]:
    found: dict[str, Overlap] = {}
    for inner, outer in (("test", "train"), ("validation", "train"), ("test", "validation")):
        known = {key: i for i, key in enumerate(keys) if rows[i][0] == outer and key is not None}
        exact = {i: known[key] for i, key in enumerate(keys) if rows[i][0] == inner and key in known}
        close: dict[int, int] = {}
        for a, b in near:
            for one, other in ((a, b), (b, a)):
                if rows[one][0] == inner and rows[other][0] == outer and one not in exact:
                    close[one] = other
        if not exact and not close:
            continue
        found[f"{inner} in {outer}"] = Overlap(exact=len(exact), near=len(close))
        pairs = [f"{rows[i][1].source} = {rows[j][1].source}" for i, j in exact.items()]
        pairs += [f"{rows[i][1].source} ~ {rows[j][1].source}" for i, j in close.items()]
        text = f"{inner} in {outer}: {len(exact)} rows are in both, {len(close)} more nearly so"
        findings.append(warning(text, pairs))
    return found


def _disagreements(
    rows: Sequence[tuple[Split, Row]], keys: Sequence[str | None], task: Task, findings: list[Finding]
) -> int:
    targets = [name for name, kind in task.columns.items() if kind in TARGETS]
    if not targets:
        return 0
    count, where = 0, []
    for members in groups(keys):
        if keys[members[0]] is None:
            continue
        written = [json.dumps([rows[i][1].values[name] for name in targets]) for i in members]
        if len(set(written)) > 1:
            count += len(members)
            other = next(i for i, text in zip(members, written, strict=True) if text != written[0])
            where.append(f"{rows[members[0]][1].source} / {rows[other][1].source}")
    if count:
        what = "label" if LABEL in targets else "target"
        findings.append(warning(f"{count} rows have the input of another row and another {what}", where))
    return count


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
