"""Texts from columns: a language of fields alone, so that a sites file can shape texts but run nothing.

    age {age:.0f}, sex {sex}[[, cholesterol {chol:.0f} mg/dl]]

A field is a column's name as it stands in the data, looked up and nothing else: there are no attributes, no
indices, no conversions. A format, where given, is one for numbers. A part in double square brackets is left
out when a column in it is missing, null, NaN or blank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from quorate.shared.errors import DataError

# Python's number formats without fill, alignment or nested fields; two digits keep width and precision sane.
_FORMAT = re.compile(r"[ +-]?0?\d{0,2}[,_]?(?:\.\d{1,2})?[dfeg%]?")
_OPTIONAL = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)


@dataclass(frozen=True)
class _Field:
    column: str
    format: str


_Part = tuple[str | _Field, ...]


@dataclass(frozen=True)
class TextTemplate:
    """A parsed template.

    Args:
        parts: each part with whether it may be left out.
    """

    parts: tuple[tuple[_Part, bool], ...]

    @classmethod
    def parse(cls, text: str) -> TextTemplate:
        """Parse a template.

        Raises: ValueError: what is wrong with it (pydantic turns this into an error that names the field).
        """
        parts: list[tuple[_Part, bool]] = []
        # re.split with one group: literal, optional, literal, optional, ..., literal.
        for index, piece in enumerate(_OPTIONAL.split(text)):
            optional = index % 2 == 1
            if "[[" in piece or "]]" in piece:
                raise ValueError("double square brackets must come in pairs and may not be nested")
            part = _parse_part(piece)
            if optional and not any(isinstance(item, _Field) for item in part):
                raise ValueError(f"[[{piece}]] holds no {{column}}, so it could never be left out")
            parts.append((part, optional))
        template = cls(tuple(parts))
        if not template.columns:
            raise ValueError("it holds no {column}, so every text would be the same")
        return template

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns it uses, in order, each once."""
        fields = (item.column for part, _ in self.parts for item in part if isinstance(item, _Field))
        return tuple(dict.fromkeys(fields))

    def render(self, values: Mapping[str, Any], source: str) -> str:
        """Return the text of one row.

        Args:
            values: the row's columns.
            source: `file:line` of the row, for messages.
        Raises: DataError: a column outside double square brackets has no value, or a value does not fit its
            format. Messages name the column, never its value.
        """
        texts = []
        for part, optional in self.parts:
            fields = [item for item in part if isinstance(item, _Field)]
            empty = [field.column for field in fields if is_missing(values.get(field.column))]
            if empty and optional:
                continue
            if empty:
                raise DataError(
                    f"{source}: the template needs column {empty[0]!r}, which has no value there; "
                    "put that part of the template in [[ ]] to leave it out, or fill the value in.",
                    kind="template-value-missing",
                )
            for item in part:
                texts.append(item if isinstance(item, str) else _format(item, values[item.column], source))
        return "".join(texts)


def is_missing(value: Any) -> bool:
    """Return whether a value counts as not there: None, NaN, or a blank string."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_text(value: str) -> bool:
    """Return whether a string is text that can be encoded: JSON can smuggle in half of a character."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def _parse_part(piece: str) -> _Part:
    part: list[str | _Field] = []
    try:
        parsed = list(Formatter().parse(piece))
    except ValueError as error:
        raise ValueError(f"{error}; write {{column}}, and {{{{ or }}}} for a brace") from error
    for literal, column, form, conversion in parsed:
        if literal:
            part.append(literal)
        if column is None:
            continue
        if not column.strip():
            raise ValueError("{} names no column; write {column}, and {{ for a brace")
        if conversion:
            raise ValueError(f"conversion !{conversion} of column {column!r} is not supported; leave it out")
        if form and not _FORMAT.fullmatch(form):
            raise ValueError(
                f"format {form!r} of column {column!r} is not a number format such as .1f, d, .3g or .0%"
            )
        part.append(_Field(column, form or ""))
    return tuple(part)


def _format(field: _Field, value: Any, source: str) -> str:
    if not field.format:
        if isinstance(value, (str, int, float)):
            return str(value)
        raise DataError(
            f"{source}: column {field.column!r} holds a {type(value).__name__}; "
            "a template takes texts and numbers.",
            kind="template-value-is-no-text",
        )
    try:
        number = value if isinstance(value, int) else float(value)
        whole = field.format.endswith("d") and (isinstance(number, int) or number.is_integer())
        return format(int(number) if whole else number, field.format)
    except (TypeError, ValueError, OverflowError):
        # `from None`: Python's own message quotes the value.
        raise DataError(
            f"{source}: the value of column {field.column!r} does not fit format {field.format!r} of the "
            "template; correct the value or leave the format out.",
            kind="template-format",
        ) from None
