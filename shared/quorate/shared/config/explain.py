"""Validation errors in words: file and line, field, what is wrong, the value, what to do."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from quorate.shared.config.config_model import ConfigModel, Name, Sha256
from quorate.shared.config.dialect import Lines, Place
from quorate.shared.config.fields import Node, dotted, root, suggest, suggest_choice

_PATTERNS = {
    Name.__metadata__[0].pattern: "1 to 64 letters, digits, `_`, `.` or `-`, with a letter or digit in front",  # type: ignore[attr-defined]
    Sha256.__metadata__[0].pattern: "64 hexadecimal digits in lower case",  # type: ignore[attr-defined]
}
_LISTS = ("tuple_type", "list_type")
_SECTIONS = ("model_type", "model_attributes_type", "dict_type", "mapping_type")


@dataclass(frozen=True)
class _Problem:
    """One of pydantic's errors with its place: the path as people write it, and what may stand there.

    Args:
        details: what pydantic says.
        path: its location without the tags of unions.
        node: what may stand there; None for a field that there is not.
        section: what it stands in.
    """

    details: ErrorDetails
    path: Place
    node: Node | None
    section: Node

    @classmethod
    def locate(cls, top: Node, details: ErrorDetails) -> _Problem:
        """Follow pydantic's location down the schema; after a union it names the alternative by its tag."""
        path: Place = ()
        node: Node | None = top
        inner, section = node, top
        for part in details["loc"]:
            if part == "[key]" and details["type"] != "extra_forbidden":
                break
            if inner is not None and inner.kinds:
                inner = inner.kinds[str(part)]
                continue
            path, section = (*path, part), section if inner is None else inner
            node = inner = None if inner is None else inner.child(part)
        return cls(details, path, node, section)


def explain(
    error: ValidationError,
    model: type[ConfigModel],
    where: str,
    lines: Lines,
    overridden: Collection[Place] = (),
) -> str:
    """Return every problem, a line each: `file:line: field: what is wrong (value ...); remedy`.

    Args:
        where: the file, as the reader knows it.
        lines: of the file, as `dialect.read_mapping` found them.
        overridden: paths that were set on the command line.
    """
    top = root(model)
    problems = [_Problem.locate(top, details) for details in error.errors(include_url=False)]
    sections = {problem.path[:-1] for problem in problems}
    said: list[str] = []
    for problem in problems:
        # A list whose entries are wrong is reported as too short as well.
        if problem.details["type"] == "too_short" and problem.path in sections:
            continue
        path, text = _words(top, problem)
        place = max(path, problem.path, key=len)
        known = (lines[place[:length]] for length in range(len(place), 0, -1) if place[:length] in lines)
        field, line = dotted(path), next(known, None)
        if any(path[: len(key)] == key for key in overridden):
            field, line = f"{field} (set on the command line)", None
        said.append(f"{where}{f':{line}' if line else ''}: {f'{field}: ' if path else ''}{text}")
    return "\n".join(_printable(line) for line in dict.fromkeys(said))


def _printable(text: str) -> str:
    """Escape control characters and foreign line ends, which keys may hold: one problem, one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _words(top: Node, problem: _Problem) -> tuple[Place, str]:
    """Return the path that people should look at, and the problem there in words."""
    details, path, node = problem.details, problem.path, problem.node
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    fits = _PATTERNS.get(context.get("pattern", "")) or (node.rule() if node else "left out")
    match kind:
        case "extra_forbidden":
            return path, f"there is no such field; {suggest(top, path, list(problem.section.fields))}"
        case "missing":
            wanted = f" ({node.description.rstrip('.')})" if node and node.description else ""
            return path, f"is missing{wanted}; add it: {fits}."
        case "value_error" | "assertion_error":
            return path, f"{str(context['error']).rstrip('.')}."
        case "union_tag_not_found" | "union_tag_invalid" if node and node.tag_field:
            path, value = (*path, node.tag_field), context.get("tag")
            fits = f"one of {', '.join(node.kinds)}"
            if value is None:
                return path, f"is missing; add it: {fits}."
            remedy = suggest_choice(value, list(node.kinds))
        case _ if kind == "invalid_key" or details["loc"][-1:] == ("[key]",):
            rule = _PATTERNS.get(context.get("pattern", ""), "text: put it in quotes")
            return path[:-1], f"key {_show(path[-1])} must be {rule}."
        case _:
            remedy = _remedy(problem)
    return path, f"must be {fits} (value {_show(value)})" + (f"; {remedy}" if remedy else ".")


def _remedy(problem: _Problem) -> str | None:
    """Say what to write instead, where the rule alone does not."""
    kind, value, path, node = problem.details["type"], problem.details["input"], problem.path, problem.node
    if kind == "finite_number":
        return "infinity and NaN are not allowed."
    if node and node.choices:
        return suggest_choice(value, node.choices)
    if not path or (node and node.kinds and not node.tag_field):
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
        return f"write {dotted((*path, node.tag_field))}: {value}, one of {', '.join(node.kinds)}."
    return None


def _show(value: Any) -> str:
    """Write a value briefly, as in the file; sections are named, not quoted."""
    text = "a section" if isinstance(value, dict) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
