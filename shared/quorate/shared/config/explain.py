"""Validation errors in words: file, field, what is wrong, the value, what to do."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from quorate.shared.config.config_model import ConfigModel
from quorate.shared.config.fields import Node, dotted, root, suggest, suggest_choice
from quorate.shared.config.texts import Name, Sha256

Path = tuple[str | int, ...]

_PATTERNS = {
    Name.__metadata__[0].pattern: "1 to 64 letters, digits, `_`, `.` or `-`, with a letter or digit in front",  # type: ignore[attr-defined]
    Sha256.__metadata__[0].pattern: "64 hexadecimal digits in lower case",  # type: ignore[attr-defined]
}
_LISTS = ("tuple_type", "list_type")
_SECTIONS = ("model_type", "model_attributes_type", "dict_type", "mapping_type")


@dataclass(frozen=True)
class _Place:
    """Where an error stands: its path as people write it, what may stand there, and whether it is a key."""

    path: Path
    node: Node | None
    parent: Node
    is_key: bool
    union: Path | None
    """Path of the union (`a number or a list`) whose alternative this error comes from."""


def explain(
    error: ValidationError, model: type[ConfigModel], where: str, overridden: Collection[Path] = ()
) -> str:
    """Return every problem, a line each: `file: field: what is wrong (value ...); remedy`.

    Args:
        error: from the validation.
        model: what was validated.
        where: the file, as the reader knows it.
        overridden: paths that were set on the command line.
    """
    top = root(model)
    located = [(_locate(top, each["loc"]), each) for each in error.errors(include_url=False)]
    lines: list[str] = []
    for place, details in _telling(located):
        path, text = _problem(top, place, details)
        origin = " (set on the command line)" if any(path[: len(key)] == key for key in overridden) else ""
        field = f"{dotted(path)}{origin}: " if path else ""
        lines.append(_printable(f"{where}: {field}{text}"))
    return "\n".join(dict.fromkeys(lines))


def _printable(text: str) -> str:
    """Escape control characters and foreign line ends, which keys may hold: one problem, one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _telling(located: list[tuple[_Place, ErrorDetails]]) -> list[tuple[_Place, ErrorDetails]]:
    """Leave out what only follows from another error.

    A union reports every alternative: those that looked inside the value tell, else one stands for all. A
    list whose entries are wrong is reported as too short as well.
    """
    unions: dict[Path, list[tuple[_Place, ErrorDetails]]] = {}
    for place, details in located:
        if place.union is not None:
            unions.setdefault(place.union, []).append((place, details))
    kept = []
    for place, details in located:
        group = unions.get(place.union, []) if place.union is not None else []
        inside = [each for each in group if len(each[0].path) > len(each[0].union or ())]
        best = inside or [each for each in group if each[1]["type"] == "value_error"] or group[:1]
        deeper = any(other.path[:-1] == place.path for other, _ in located)
        if (not group or (place, details) in best) and not (details["type"] == "too_short" and deeper):
            kept.append((place, details))
    return kept


def _locate(top: Node, loc: Iterable[str | int]) -> _Place:
    """Walk pydantic's location along the schema, dropping the parts that name a union's alternative."""
    path: Path = ()
    parent, union, is_key = top, None, False
    node: Node | None = top
    union_node = None
    for part in loc:
        if part == "[key]":
            is_key = True
        elif node is None:
            path = (*path, part)
        elif (branch := _branch(node, part)) is not None:
            if not branch.fields:
                union, union_node = path, node
            parent = node = branch
        else:
            parent, node = node, node.child(part)
            path = (*path, part)
    if union is not None and path == union:
        node = union_node
    return _Place(path, node, parent, is_key, union)


def _branch(node: Node, part: str | int) -> Node | None:
    """Return the alternative that `part` names, if `node` is a union, whose alternatives are so named."""
    if len(node.branches) < 2 or not isinstance(part, str):
        return None
    for branch in node.branches:
        tags = branch.fields[node.tag_field].choices if node.tag_field else []
        title = branch.resolved.get("title")
        if part in tags or (branch.fields and title and title in part):
            return branch
    lists = [branch for branch in node.branches if branch.resolved.get("type") == "array"]
    return lists[0] if lists and ("tuple[" in part or "list[" in part) else Node({}, {})


def _problem(top: Node, place: _Place, details: ErrorDetails) -> tuple[Path, str]:
    """Return the path that people should look at, and the problem there in words."""
    kind, path, node, value = details["type"], place.path, place.node, details["input"]
    context: dict[str, Any] = details.get("ctx", {})
    if place.is_key or kind == "invalid_key":
        return path[:-1], f"key {_show(path[-1])} must be {_key_rule(context)}."
    if kind == "extra_forbidden":
        return path, f"there is no such field; {suggest(top, path, list(place.parent.fields))}"
    if kind == "missing":
        wanted = f" ({node.description.rstrip('.')})" if node and node.description else ""
        return path, f"is missing{wanted}; add it: {_rule(node, context)}."
    if kind in ("union_tag_not_found", "union_tag_invalid") and node is not None:
        return _wrong_tag(node, path, context)
    if kind in ("value_error", "assertion_error"):
        return path, f"{str(context['error']).rstrip('.')}."
    remedy = _remedy(kind, place, value)
    return path, f"must be {_rule(node, context)} (value {_show(value)})" + (f"; {remedy}" if remedy else ".")


def _wrong_tag(node: Node, path: Path, context: dict[str, Any]) -> tuple[Path, str]:
    field, tag = node.tag_field or "", context.get("tag")
    allowed = ", ".join(node.tags)
    if tag is None:
        return (*path, field), f"is missing; add it: one of {allowed}."
    remedy = suggest_choice(tag, node.tags)
    return (*path, field), f"must be one of {allowed} (value {_show(tag)})" + (
        f"; {remedy}" if remedy else "."
    )


def _rule(node: Node | None, context: dict[str, Any]) -> str:
    if context.get("pattern") in _PATTERNS:
        return _PATTERNS[context["pattern"]]
    return node.rule() if node else "left out"


def _key_rule(context: dict[str, Any]) -> str:
    return _PATTERNS.get(context.get("pattern", ""), "text: put it in quotes")


def _remedy(kind: str, place: _Place, value: Any) -> str | None:
    """Say what to write instead, where the rule alone does not."""
    node, path = place.node, place.path
    if kind == "finite_number":
        return "infinity and NaN are not allowed."
    if node and node.choices:
        return suggest_choice(value, node.choices)
    if place.union == path or not path:
        return None
    if kind == "string_type" and (
        isinstance(value, (bool, int, float)) or (value is None and isinstance(path[-1], int))
    ):
        return f"put it in quotes: {_show(_show(value))}."
    if value is None:
        optional = node is not None and "default" in node.schema
        return "write a value" + (", or leave the field out for its default." if optional else ".")
    if kind in _LISTS and isinstance(value, (str, int, float)):
        entries = value.split(",") if isinstance(value, str) else [value]
        return f"write {path[-1]}: [{', '.join(str(entry).strip() for entry in entries)}]."
    if kind in _SECTIONS and node and node.tag_field and isinstance(value, str):
        return f"write {dotted((*path, node.tag_field))}: {value}, one of {', '.join(node.tags)}."
    return None


def _show(value: Any) -> str:
    """Write a value briefly, as in the file; sections are named, not quoted."""
    if isinstance(value, (dict, BaseModel)):
        return "a section"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
