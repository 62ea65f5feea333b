"""Files of rows: JSON lines, comma- or tab-separated values, Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from quorate.shared.errors import DataError
from quorate.shared.protocol.messages import Split
from quorate.shared.tasks.task import Row

SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
"""File names (without ending) that stand for each split."""
Refuse = Callable[[DataError], None]
"""Told of a row that cannot be used; returns to leave it out and go on with the next."""
# Beyond this a column's name is likely a row that was taken for the header; it is not shown.
_LONGEST_NAME = 40


def stop(error: DataError) -> None:
    """Raise at the first row that cannot be used."""
    raise error from None  # the cause may carry the whole line


def read_file(path: Path, refuse: Refuse = stop) -> list[Row]:
    """Read one file of rows.

    Args:
        path: ends in one of `SUFFIXES`, which says what it is; texts are UTF-8, with or without a BOM.
    Returns: one Row per row, values as the file has them, blank cells of a CSV file as None, source
        `file:line` (Parquet: `file:row`, from 1).
    Raises: DataError: unknown ending, unreadable, empty or damaged file; names file and line.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        message = f"{path}: files ending in {suffix!r} cannot be read; use {', '.join(SUFFIXES)}."
        raise DataError(message, kind="unknown-ending")
    try:
        if suffix == ".parquet":
            rows = list(_read_parquet(path))
        elif suffix in (".csv", ".tsv"):
            rows = list(_read_csv(path, refuse))
        else:
            rows = list(_read_jsonl(path, refuse))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.", kind="unreadable-file") from error
    if not rows:
        message = f"{path} is empty: it holds no row; give it rows, or name another file."
        raise DataError(message, kind="no-rows")
    return rows


def read_folder(folder: Path, refuse: Refuse = stop) -> dict[Split, list[Row]]:
    """Read a folder with a file for `train`, and for `validation` and `test` where it has them.

    Raises: DataError: no train file, two files for one split, or what `read_file` raises.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    chosen: dict[Split, Path] = {}
    for path in files:
        if (split := split_of(path.stem)) is None:
            continue
        if split in chosen:
            raise DataError(
                f"{folder} holds both {chosen[split].name} and {path.name} for {split}; "
                "keep one, or name the one file as source.",
                kind="two-for-one-split",
            )
        chosen[split] = path
    if "train" not in chosen:
        found = ", ".join(path.name for path in files[:10]) or "nothing"
        raise DataError(
            f"{folder} has no training rows: there is no train file ({', '.join(SUFFIXES)}), only: {found}."
            " Rename the file, or name it as source and it is split.",
            kind="no-train-file",
        )
    return {split: read_file(chosen[split], refuse) for split in SPLIT_NAMES if split in chosen}


def has_table(folder: Path) -> bool:
    """Whether the folder has a file of training rows, as `read_folder` reads them."""
    return any(p.suffix.lower() in SUFFIXES and split_of(p.stem) == "train" for p in folder.iterdir())


def split_of(name: str) -> Split | None:
    """Return the split that a file or hub split of this name is, if any."""
    return next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), None)


def describe_columns(names: Iterable[str]) -> str:
    """List columns for a message: at most 30, and none that is too long to be a name."""
    known = list(names)
    shown = [name for name in known if name and len(name) <= _LONGEST_NAME][:30]
    if hidden := len(known) - len(shown):
        shown.append(f"and {hidden} more" if shown else f"{hidden} without a usable name")
    return ", ".join(shown)


def _lines(path: Path, refuse: Refuse) -> Iterator[str]:
    """Yield a text file's lines with their ends, so that the line of a wrong byte can be named."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                refuse(
                    DataError(
                        f"{path}:{number}: byte {error.start + 1} of the line is not UTF-8; "
                        "save the file as UTF-8 (iconv -f WINDOWS-1252 -t UTF-8 helps with most).",
                        kind="not-utf8",
                    )
                )
                yield "\n"  # the lines after it keep their numbers


def _read_jsonl(path: Path, refuse: Refuse) -> Iterator[Row]:
    for number, line in enumerate(_lines(path, refuse), start=1):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            values = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            column = f" (at character {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
            refuse(
                DataError(
                    f"{source}: not one whole JSON object on the line{column}; "
                    "the line may be cut off, or the file may be one JSON list instead of JSON lines.",
                    kind="not-json",
                )
            )
            continue
        if not isinstance(values, dict):
            kind = _json_type(values)
            refuse(
                DataError(
                    f"{source}: a line must be a JSON object, this one is a {kind}.", kind="not-an-object"
                )
            )
            continue
        yield Row(values, source)


def _json_type(value: Any) -> str:
    names = {list: "list", str: "string", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")


def _read_csv(path: Path, refuse: Refuse) -> Iterator[Row]:
    lines = _lines(path, refuse)
    first = next(lines, "")
    # The header decides: files saved where the comma is the decimal sign use semicolons.
    delimiter = max((",", ";", "\t"), key=first.count)
    rows = _csv_rows(path, chain([first], lines), delimiter, refuse)
    header = _header(next(rows, (1, []))[1], path)
    for line, cells in rows:
        source = f"{path}:{line}"
        if len(cells) != len(header):
            refuse(
                DataError(
                    f"{source}: {len(cells)} cells under a header of {len(header)} columns; "
                    "a cell that holds the separator needs double quotes around it.",
                    kind="cell-count",
                )
            )
            continue
        named = zip(header, cells, strict=True)
        yield Row({name: cell if cell.strip() else None for name, cell in named if name}, source)


def _csv_rows(
    path: Path, lines: Iterable[str], delimiter: str, refuse: Refuse
) -> Iterator[tuple[int, list[str]]]:
    """Yield each row that is not blank, with the line it begins on."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    line = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            advice = (
                'a double quote that opens a cell must be closed, and one inside a cell is written twice ("")'
            )
            refuse(DataError(f"{path}:{line}: not a row of a CSV file: {error}; {advice}.", kind="not-csv"))
            cells = []
        if cells:
            yield line, cells
        line = reader.line_num + 1


def _header(cells: list[str], path: Path) -> list[str]:
    names = [cell.strip() for cell in cells]
    if not any(names):
        message = f"{path} is empty: it has no header line; give it column names and rows."
        raise DataError(message, kind="no-header")
    if any(_is_number(name) for name in names):
        raise DataError(
            f"{path}:1: the first line holds numbers, so it looks like a row; put a line of column names "
            "first.",
            kind="header-of-numbers",
        )
    named = [name for name in names if name]
    if len(set(named)) < len(named):
        message = f"{path}:1: two columns have the same name; give every column a name of its own."
        raise DataError(message, kind="column-twice")
    return names


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow; pip install 'quorate[parquet]', or convert the file."
        ) from error
    arrow = import_module("pyarrow")
    try:
        batches = parquet.ParquetFile(path).iter_batches()
        number = 0
        for batch in batches:
            for values in batch.to_pylist():
                number += 1
                yield Row(values, f"{path}:{number}")
    except (arrow.ArrowInvalid, arrow.ArrowNotImplementedError) as error:
        message = f"{path}: not a readable Parquet file; it may be cut off, or be something else."
        raise DataError(message, kind="not-parquet") from error
