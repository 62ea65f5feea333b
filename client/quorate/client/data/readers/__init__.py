"""Readers: from a source to raw rows, split by split, with every row's origin."""

# A reader gives columns as the data have them; `quorate.client.data.splits` makes task columns of them.
# Messages name files, lines and columns, never the text of a row.

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quorate.client.data.readers.coco import is_coco, read_coco, read_coco_folder
from quorate.client.data.readers.hub import read_hub
from quorate.client.data.readers.image_files import locate_images, read_image_folder
from quorate.client.data.readers.tables import (
    Refuse,
    describe_columns,
    has_table,
    read_file,
    read_folder,
    stop,
)
from quorate.client.data.readers.toy import read_sklearn
from quorate.shared.config.sites_config import SourceConfig
from quorate.shared.errors import DataError
from quorate.shared.model.sources import expand, resolve_local
from quorate.shared.protocol.messages import Split
from quorate.shared.tasks.task import Row


def read_source(
    source: SourceConfig, base_dir: Path, images: Sequence[str] = (), refuse: Refuse = stop
) -> dict[Split, list[Row]]:
    """Read every split a source has files for; one file is all `train`, to be split later.

    Args:
        images: columns that hold images; their cells become absolute paths or bytes.
    Returns: raw rows per split, in file order; `train` is always there, no split is empty.
    Raises: ConfigError: an unset variable. DataError: missing, empty or damaged data.
    """
    where = "source"
    text = expand(source.source, where)
    kind, _, name = text.partition(":")
    if kind == "sklearn":
        return {"train": read_sklearn(name)}
    if kind == "hub":
        splits = _train_first(read_hub(name, source.revision), text)
        return {split: locate_images(rows, images, Path()) for split, rows in splits.items()}
    path = resolve_local(source.source, base_dir, where=where)
    if images and path.is_file() and is_coco(path):
        return {"train": read_coco(path)}
    if not path.is_dir():
        return {"train": locate_images(read_file(path, refuse), images, path.parent)}
    if images and (found := read_coco_folder(path)) is not None:
        return _train_first(found, str(path))
    if images and not has_table(path) and (found := read_image_folder(path)) is not None:
        return _train_first(found, str(path))
    splits = _train_first(read_folder(path, refuse), str(path))
    return {split: locate_images(rows, images, path) for split, rows in splits.items()}


def _train_first(splits: dict[Split, list[Row]], origin: str) -> dict[Split, list[Row]]:
    if "train" not in splits:
        raise DataError(f"{origin} has no training rows: name the split or its file `train`.")
    return splits


__all__ = ["Refuse", "describe_columns", "read_source", "stop"]
