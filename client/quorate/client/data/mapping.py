"""From the columns and labels of a site's data to those of the run's task.

Messages name file, line and column. They may quote a label's value, never the text of a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quorate.client.data.boxes import from_cell, objects_of
from quorate.client.data.readers import Refuse, describe_columns, stop
from quorate.shared.config.sites_config import SourceConfig
from quorate.shared.config.template import TextTemplate, is_missing, is_text
from quorate.shared.errors import ConfigError, DataError
from quorate.shared.tasks.task import Kind, Row

LABEL, TEXT, GROUP = "label", "text", "group"
ROLES = ("system", "user", "assistant", "tool")
"""Who may speak in a conversation."""
_HALF = "holds half of a character (a lone \\ud800 to \\udfff)"


@dataclass(frozen=True)
class LoadedRow(Row):
    """A row with the task's columns in `values`, and the columns it came from."""

    raw: Mapping[str, Any]
    """All columns of the data, for partitions by column; never given to a task."""


class RowMapper:
    """Turns raw rows into rows of the task."""

    def __init__(self, source: SourceConfig, kinds: Mapping[str, Kind], labels: Sequence[str]) -> None:
        self.columns = {name: source.columns.get(name, name) for name in kinds}
        if unknown := sorted(set(source.columns) - {*kinds, GROUP}):
            message = f"columns.{unknown[0]}: the task has no such column; it has {', '.join(kinds)}."
            raise ConfigError(message)
        self.group = source.columns.get(GROUP)
        self.template = TextTemplate.parse(source.template) if source.template is not None else None
        if self.template is not None and self.columns.pop(TEXT, None) is None:
            message = "template builds a text, but the task has no column `text`; leave it out."
            raise ConfigError(message, kind="no-text-column")
        self.kinds = kinds
        self.labels = _Labels(source.labels, labels)

    def map(self, rows: Sequence[Row], refuse: Refuse = stop) -> list[LoadedRow]:
        """Map the rows of one split.

        Raises: DataError: a column that no row has.
        """
        known = dict.fromkeys(name for row in rows for name in row.values)
        needed = [*self.columns.values(), *(self.template.columns if self.template else ())]
        needed += [] if self.group is None else [self.group]
        for column in needed:
            if column not in known:
                raise DataError(
                    f"{rows[0].source}: column {column!r} is missing here and in every other row; the data "
                    f"have: {describe_columns(known)}. Map it with `columns`, or correct the template.",
                    kind="column-missing",
                )
        mapped: list[LoadedRow] = []
        for row in rows:
            try:
                mapped.append(self._row(row))
            except DataError as error:
                refuse(error)
        return mapped

    def _row(self, row: Row) -> LoadedRow:
        values: dict[str, Any] = {}
        if self.template is not None:
            values[TEXT] = self.template.render(row.values, row.source)
        for name, column in self.columns.items():
            if column not in row.values:
                raise DataError(
                    f"{row.source}: column {column!r} is missing; this row has: "
                    f"{describe_columns(row.values)}. Fill it in or remove the row.",
                    kind="cell-missing",
                )
            values[name] = row.values[column]
        for name, value in values.items():
            where = f"{row.source}: column {self.columns.get(name, name)!r}"
            values[name] = self._value(self.kinds[name], value, where)
        return LoadedRow(values, row.source, row.values, group=self._group(row))

    def _group(self, row: Row) -> str | None:
        """Return whose row it is, as text: 7, 7.0 and "7" are one group."""
        if self.group is None:
            return None
        value = row.values.get(self.group)
        if is_missing(value):
            raise DataError(
                f"{row.source}: column {self.group!r} is empty, so nothing says which group the row belongs "
                "to; fill it in or remove the row.",
                kind="no-group",
            )
        group = as_key(value)
        if not is_text(group):
            raise DataError(
                f"{row.source}: column {self.group!r} {_HALF}, so nothing says which group the row "
                "belongs to; mend it or remove the row.",
                kind="group-half-character",
            )
        return group

    def _value(self, kind: Kind, value: Any, where: str) -> Any:
        """Return a cell as its kind has it.

        Raises: DataError: it is empty, or cannot be that.
        """
        if kind == "label":
            return self.labels.ids(value, where)
        if is_missing(value):
            raise DataError(f"{where} is empty; fill it in or remove the row.", kind="empty-cell")
        if kind == "text" and not isinstance(value, str):
            remedy = "use `template` to write texts from columns" if TEXT in self.kinds else "make it one"
            message = f"{where} holds a {type(value).__name__}, not a text; {remedy}."
            raise DataError(message, kind="not-a-text")
        if kind == "text" and not is_text(value):
            raise DataError(f"{where} {_HALF}; the text was cut there: mend it or remove the row.")
        if kind == "number":
            return _as_number(value, where)
        if kind == "image" and not isinstance(value, str | bytes):
            message = f"{where} holds a {type(value).__name__}, not an image's path or bytes."
            raise DataError(message, kind="not-an-image")
        if kind in ("tokens", "tags"):
            return self._words(kind, value, where)
        if kind == "objects":
            return objects_of(value, self.labels.id, where)
        return _as_messages(value, where) if kind == "messages" else value

    def _words(self, kind: Kind, value: Any, where: str) -> list[Any]:
        """Return a list of words, or of the ids of their tags; a cell of a CSV file holds it as JSON."""
        otherwise = f'{where}: the list is not JSON; write ["one", "two"] in the cell.'
        value = from_cell(value, otherwise, "list-not-json")
        if not isinstance(value, list | tuple):
            raise DataError(f"{where} holds a {type(value).__name__}, not a list with one entry per word.")
        if kind == "tags":
            return [self.labels.id(each, where) for each in value]
        if wrong := [each for each in value if not isinstance(each, str)]:
            raise DataError(f"{where}: a word is a {type(wrong[0]).__name__}; words are texts.")
        return list(value)


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
            otherwise = f'{where}: the list of labels is not JSON; write ["one", "two"] in the cell.'
            value = from_cell(value, otherwise, "labels-not-json")
        if isinstance(value, (list, tuple)):
            return sorted({self.id(item, where) for item in value})
        return self.id(value, where)

    def id(self, value: Any, where: str) -> int:
        if is_missing(value):
            raise DataError(f"{where} has no label; fill it in or remove the row.", kind="no-label")
        key = as_key(value)
        if key in self.mapping:
            return self.index[self.mapping[key]]
        number = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else None
        if key in self.index:
            if number not in (None, self.index[key]):
                raise DataError(
                    f"{where}: {key} may be the label of that name or label number {key} counted from 0; "
                    f"say which with `labels: {{{key}: ...}}` for each value.",
                    kind="ambiguous-label",
                )
            return self.index[key]
        # A mapping that leaves a number out says nothing of it; to take it for an id would be a guess.
        if number is not None and number < len(self.names) and not any(k.isdigit() for k in self.mapping):
            return number
        shown = key if len(key) <= 60 else f"a value of {len(key)} characters"
        raise DataError(
            f"{where}: label {shown!r} is not among the run's labels; {self._listed()} "
            "Map it with `labels`, correct it, or remove the row.",
            kind="unknown-label",
        )

    def _listed(self) -> str:
        more = f" and {len(self.names) - 12} more" if len(self.names) > 12 else ""
        return f"its labels are {', '.join(self.names[:12])}{more}."


def as_key(value: Any) -> str:
    """Write a label's value as `labels` of a sites file does: 1.0 as 1, truth values as JSON has them."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _as_number(value: Any, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where} does not hold a finite number; correct it or remove the row.")
    return number


def _as_messages(value: Any, where: str) -> list[dict[str, str]]:
    """Return a conversation; a cell of a CSV file holds it as JSON."""
    otherwise = f'{where}: the messages are not JSON; write [{{"role": "user", "content": "..."}}, ...].'
    value = from_cell(value, otherwise, "messages-not-json")
    if not isinstance(value, list | tuple) or not value:
        raise DataError(
            f"{where} does not hold a list of messages; give it one, or remove the row.", kind="no-messages"
        )
    messages = []
    for number, message in enumerate(value, start=1):
        place = f"{where}, message {number}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise DataError(f"{place} is not an object with `role` and `content`.", kind="not-a-message")
        if more := [key for key, held in message.items() if key not in ("role", "content") and held]:
            raise DataError(
                f"{place} has fields besides `role` and `content` ({describe_columns(map(str, more))}), "
                "which would be lost; put what they say into the content, or remove them.",
                kind="message-fields",
            )
        if message["role"] not in ROLES:
            raise DataError(f"{place}: its role is none of {', '.join(ROLES)}.", kind="message-role")
        if not isinstance(message["content"], str) or is_missing(message["content"]):
            raise DataError(f"{place}: its content is empty or not a text.", kind="message-content")
        messages.append({"role": message["role"], "content": message["content"]})
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            f"{where} holds no message of the assistant, so there is nothing to learn from it.",
            kind="no-answer",
        )
    return messages
