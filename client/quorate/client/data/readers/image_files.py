"""Images: folders of them, and the columns of a table that name them or hold them.

An image stays what it is here, a path or the bytes of a file; it is opened by
`quorate.shared.tasks.vision.image_task.decode`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quorate.client.data.readers.tables import SUFFIXES, read_file, split_of
from quorate.shared.errors import DataError
from quorate.shared.protocol.messages import Split
from quorate.shared.tasks.task import Row
from quorate.shared.tasks.vision.image_task import IMAGE_SUFFIXES

log = logging.getLogger(__name__)

IMAGE, LABEL, FILE_NAME = "image", "label", "file_name"
_METADATA = tuple(f"metadata{suffix}" for suffix in SUFFIXES)


def read_image_folder(folder: Path) -> dict[Split, list[Row]] | None:
    """Read an image folder, laid out as the `imagefolder` of Hugging Face's datasets.

    Args:
        folder: has a folder for `train`, and for `validation` and `test` where there are any; each of them,
            or else `folder` itself, holds a `metadata` file whose column `file_name` names images, or a
            folder of images for each class.
    Returns: rows per split, with the columns `image` and, from class folders, `label`; the source is
        `metadata:line`, or the image's own path. None when `folder` is no image folder.
    Raises: DataError: two folders for one split, an image that is missing or outside the class folders.
    """
    splits: dict[Split, Path] = {}
    for path in _folders(folder):
        if (split := split_of(path.name)) is not None:
            if split in splits:
                message = f"{folder} holds both {splits[split].name} and {path.name}; keep one."
                raise DataError(message, kind="two-for-one-split")
            splits[split] = path
    if not splits:
        rows = _read_split(folder)
        return {"train": rows} if rows else None
    if named := _metadata_file(folder):
        raise DataError(
            f"{named} lies beside folders that are splits ({', '.join(p.name for p in splits.values())}); "
            "put a metadata file into each of them, with file names that start there.",
            kind="metadata-beside-splits",
        )
    found = {split: _read_split(path) for split, path in splits.items()}
    for split, rows in found.items():
        if not rows:
            raise DataError(
                f"{splits[split]} holds no images ({', '.join(IMAGE_SUFFIXES)}): put them into a folder for "
                "each class, or add a metadata.jsonl or metadata.csv with a column file_name.",
                kind="no-images",
            )
    return dict(found)


def locate_images(rows: Sequence[Row], columns: Sequence[str], folder: Path) -> list[Row]:
    """Return rows whose images are absolute paths of files that are there, or bytes.

    Args:
        rows: as a table has them; a cell is a path, bytes, or `{bytes, path}` as in the Parquet files of data
            sets with images. What is missing or something else stays, to be refused by the mapper.
        columns: those that hold images; rows without such a column are left alone.
        folder: where relative paths start, the table's own.
    Raises: DataError: naming the row, for a file that is not there.
    """
    located = []
    for row in rows:
        found = {
            name: _located(row.values[name], folder, f"{row.source}: column {name!r}")
            for name in columns
            if name in row.values
        }
        located.append(Row({**row.values, **found}, row.source))
    return located


def _located(value: Any, folder: Path, where: str) -> Any:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str) or not value.strip():
        return value
    path = (folder / value.strip()).absolute()
    if not path.is_file():
        raise DataError(
            f"{where}: there is no image {path}; relative paths start at the table's folder: "
            "correct the path, put the file there, or remove the row.",
            kind="image-not-there",
        )
    return str(path)


def _read_split(folder: Path) -> list[Row]:
    """Read the images of one split: those its metadata name, else those of its class folders."""
    if (table := _metadata_file(folder)) is not None:
        rows = read_file(table)
        for row in rows:
            if not isinstance(row.values.get(FILE_NAME), str):
                message = f"{row.source}: has no {FILE_NAME!r}, which names the row's image."
                raise DataError(message, kind="no-image-named")
        return [
            Row({**row.values, IMAGE: row.values[FILE_NAME]}, row.source)
            for row in locate_images(rows, [FILE_NAME], folder)
        ]
    rows = [
        Row({IMAGE: str(path.absolute()), LABEL: group.name}, str(path))
        for group in _folders(folder)
        for path in _images(group)
    ]
    loose = [path for path in folder.iterdir() if _is_image(path)]
    if rows and loose:
        message = f"{min(loose)} lies beside the class folders; put it into one of them, or remove it."
        raise DataError(message, kind="image-beside-classes")
    return rows


def _metadata_file(folder: Path) -> Path | None:
    found = [folder / name for name in _METADATA if (folder / name).is_file()]
    if len(found) > 1:
        raise DataError(f"{folder} holds both {found[0].name} and {found[1].name}; keep one.")
    return found[0] if found else None


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> Iterator[Path]:
    others = 0
    for path in sorted(folder.rglob("*")):
        if _is_image(path):
            yield path
        elif path.is_file() and not path.name.startswith("."):
            others += 1
    if others:
        log.warning("%s: %d files with other endings than an image's are left out", folder, others)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
