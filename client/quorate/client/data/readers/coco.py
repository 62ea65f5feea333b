"""Images with boxes, annotated as COCO does: one JSON file a split with images, annotations and categories.

Source of the format: https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quorate.client.data.readers.tables import split_of
from quorate.shared.errors import DataError
from quorate.shared.protocol.messages import Split
from quorate.shared.tasks.task import Row

log = logging.getLogger(__name__)

# train.coco.json, instances_train2017.json, _annotations.coco.json in a split's own folder.
_NAME = re.compile(r"(?P<split>\w+)\.coco\.json|instances_(?P<instances>\w+)\.json", re.IGNORECASE)
_INSIDE = "_annotations.coco.json"
_OF_THE_FORMAT = frozenset(
    {"id", "file_name", "width", "height", "license", "coco_url", "flickr_url", "date_captured"}
)


def read_coco_folder(folder: Path) -> dict[Split, list[Row]] | None:
    """Read a folder of COCO files and images.

    Args:
        folder: has for each split a file `SPLIT.coco.json`, or `instances_SPLIT.json` (also in a folder
            `annotations`), beside a folder SPLIT of images; or a folder SPLIT with the images and a file
            `_annotations.coco.json`. A year after the split's name is passed over.
    Returns: rows per split, with the columns `image` (absolute path) and `objects` (`bbox` in pixels, and
        `category` by name), and what else an image's entry says; None when the folder has no such files.
    Raises: DataError: two files for one split, and what `read_coco` raises.
    """
    chosen: dict[Split, Path] = {}
    for path in _candidates(folder):
        name = path.parent.name if path.name == _INSIDE else _stem(path)
        if (split := split_of(name.rstrip("0123456789"))) is None:
            continue
        if split in chosen:
            message = f"{folder} holds both {chosen[split]} and {path} for {split}; keep one."
            raise DataError(message, kind="two-for-one-split")
        chosen[split] = path
    return {split: read_coco(path) for split, path in chosen.items()} or None


def is_coco(path: Path) -> bool:
    """Whether a file's name says that it holds COCO annotations."""
    return path.name == _INSIDE or _NAME.fullmatch(path.name) is not None


def _candidates(folder: Path) -> Iterator[Path]:
    for pattern in ("*.json", "annotations/*.json", f"*/{_INSIDE}"):
        yield from sorted(path for path in folder.glob(pattern) if is_coco(path))


def read_coco(path: Path) -> list[Row]:
    """Read one COCO file; see `read_coco_folder`. Crowd regions (`iscrowd`) are no boxes and are left out.

    Raises: DataError: not such a file; an image listed twice, or missing; an annotation of an image or a
        category that the file does not list. Names file and image or annotation.
    """
    data = _parse(path)
    categories = {each.get("id"): each.get("name") for each in _list(data, "categories", path)}
    images = _list(data, "images", path)
    boxes: dict[Any, list[tuple[Any, Any]]] = {each.get("id"): [] for each in images}
    if len(boxes) < len(images):
        twice = next(i for i in boxes if sum(each.get("id") == i for each in images) > 1)
        message = f"{path}: image id {twice!r} is listed twice; give every image an id of its own."
        raise DataError(message, kind="image-id-twice")
    crowds = 0
    for number, each in enumerate(_list(data, "annotations", path), start=1):
        where = f"{path}: annotation {each.get('id', f'number {number}')!r}"
        image, category = each.get("image_id"), each.get("category_id")
        if image not in boxes:
            message = f"{where} is of image {image!r}, which `images` does not list; add it or remove it."
            raise DataError(message, kind="image-not-listed")
        if categories.get(category) is None:
            message = f"{where} is of category {category!r}, which `categories` does not list."
            raise DataError(message, kind="category-not-listed")
        if each.get("iscrowd"):
            crowds += 1
        else:
            boxes[image].append((each.get("bbox"), categories[category]))
    if crowds:
        log.warning("%s: %d crowd regions are left out: they are not boxes of one object", path, crowds)
    folder = _image_folder(path)
    return [_row(each, boxes[each.get("id")], folder, path) for each in images]


def _row(image: Mapping[str, Any], boxes: list[tuple[Any, Any]], folder: Path, path: Path) -> Row:
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        raise DataError(f"{path}: image {image.get('id')!r} has no file_name.", kind="no-file-name")
    source = f"{path}: image {name}"
    file = (folder / name).absolute()
    if not file.is_file():
        message = f"{source}: there is no file {file}; put it there, or remove the image and its boxes."
        raise DataError(message, kind="image-not-there")
    objects = {"bbox": [box for box, _ in boxes], "category": [category for _, category in boxes]}
    more = {key: value for key, value in image.items() if key not in _OF_THE_FORMAT}
    return Row({**more, "image": str(file), "objects": objects}, source)


def _image_folder(path: Path) -> Path:
    """Return where a file's images lie: beside it, or in the folder of its split's name."""
    if path.name == _INSIDE:
        return path.parent
    name = _stem(path)
    above = path.parent.parent if path.parent.name == "annotations" else path.parent
    places = [above / name, above / "images" / name, above / "images"]
    return next((place for place in places if place.is_dir()), above)


def _stem(path: Path) -> str:
    """Return the split as a file's name says it; without its ending where it is not named so."""
    named = _NAME.fullmatch(path.name)
    return (named["split"] or named["instances"]) if named else path.stem


def _parse(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        message = f"{path} is not one whole JSON object in UTF-8; it may be cut off."
        raise DataError(message, kind="coco-not-json") from None
    if not isinstance(data, dict):
        message = f"{path} is not a COCO file: it must hold an object with images and annotations."
        raise DataError(message, kind="coco-no-object")
    return data


def _list(data: Mapping[str, Any], name: str, path: Path) -> list[dict[str, Any]]:
    found = data.get(name)
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        message = f"{path} is not a COCO file: it has no list of objects {name!r}."
        raise DataError(message, kind="coco-no-list")
    if name != "annotations" and not found:
        raise DataError(f"{path} is empty: {name!r} holds nothing.", kind="coco-empty-list")
    return found
