"""From the forms in which data sets write boxes to those of a detection task."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from quorate.shared.errors import DataError

Object = tuple[int, float, float, float, float]
"""Label id, x, y, width, height [pixels], from the left upper corner of the upright image."""
_CATEGORIES = ("category", "categories", "label", "labels", "category_id")
_FORMS = '{"bbox": [[x, y, width, height], ...], "categories": [...]}'


def objects_of(value: Any, label_id: Callable[[Any, str], int], where: str) -> list[Object]:
    """Return an image's objects; an empty list where it shows none.

    Args:
        value: `{bbox: [[x, y, width, height], ...], categories: [...]}` as the image folders and data sets of
            Hugging Face have it, or a list of `{bbox, category}`; in a CSV cell either as JSON.
        label_id: from a category and where it stands to the label's id.
    Raises: DataError: another form, a box that is no box, an unknown category; says which object.
    """
    value = from_cell(value, f"{where}: the objects are not JSON; write {_FORMS}.", "objects-not-json")
    return [
        (label_id(category, f"{where}, object {number}"), *_box(box, f"{where}, object {number}"))
        for number, (box, category) in enumerate(_pairs(value, where), start=1)
    ]


def from_cell(value: Any, otherwise: str, kind: str) -> Any:
    """Return a value, of a text (a cell of a CSV file) what it says as JSON.

    Raises: DataError: it is no JSON; with the words `otherwise`, of that `kind`.
    """
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        raise DataError(otherwise, kind=kind) from None


def _pairs(value: Any, where: str) -> list[tuple[Any, Any]]:
    if isinstance(value, list | tuple) and all(isinstance(each, Mapping) for each in value):
        return [(each.get("bbox"), _categories(each, where)) for each in value]
    boxes = value.get("bbox") if isinstance(value, Mapping) else None
    categories = _categories(value, where) if isinstance(boxes, list | tuple) else None
    if not isinstance(boxes, list | tuple) or not isinstance(categories, list | tuple):
        raise DataError(f"{where} does not hold boxes and their categories; write {_FORMS}.", kind="no-boxes")
    if len(boxes) != len(categories):
        message = f"{where}: {len(boxes)} boxes and {len(categories)} categories; there must be one for each."
        raise DataError(message, kind="boxes-and-categories")
    return list(zip(boxes, categories, strict=True))


def _categories(value: Mapping[str, Any], where: str) -> Any:
    found = [name for name in _CATEGORIES if name in value]
    if len(found) != 1:
        message = f"{where}: the objects need one of {', '.join(_CATEGORIES)} beside bbox."
        raise DataError(message, kind="no-categories")
    return value[found[0]]


def _box(value: Any, where: str) -> tuple[float, float, float, float]:
    figures = list(value) if isinstance(value, list | tuple) else []
    if len(figures) != 4 or not all(
        isinstance(each, int | float) and not isinstance(each, bool) and math.isfinite(each)
        for each in figures
    ):
        message = f"{where}: a box is four finite numbers, x, y, width and height in pixels."
        raise DataError(message, kind="box-figures")
    x, y, width, height = map(float, figures)
    if width <= 0 or height <= 0:
        message = f"{where}: the box is {width:g} wide and {height:g} high; correct it or remove it."
        raise DataError(message, kind="box-size")
    return x, y, width, height
