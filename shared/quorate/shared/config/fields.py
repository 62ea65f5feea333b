"""The fields of a configuration model, read off its JSON schema: what there is, what fits, what was meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from itertools import chain
from typing import Any

from pydantic import BaseModel

Schema = Mapping[str, Any]
_WORDS = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "a section of `field: value` lines",
}


@dataclass(frozen=True)
class Node:
    """One place in a configuration: the schema of what may stand there."""

    schema: Schema
    definitions: Schema

    def _at(self, schema: Schema) -> Node:
        return Node(schema, self.definitions)

    @property
    def resolved(self) -> Schema:
        """The schema with its reference followed."""
        reference = self.schema.get("$ref")
        return self.definitions[reference.rpartition("/")[2]] if reference else self.schema

    @property
    def branches(self) -> list[Node]:
        """The alternatives of a union, null left out; the node itself when it is none."""
        schema = self.resolved
        parts = schema.get("anyOf") or schema.get("oneOf")
        if parts is None:
            return [self]
        nodes = [self._at(part) for part in parts if part.get("type") != "null"]
        return [branch for node in nodes for branch in node.branches]

    @property
    def tag_field(self) -> str | None:
        """The field that says which kind of section this is (`name` of a rule), if there is one.

        A kind may go by several names (`unit: record` and `unit: group`), but no two kinds by the same.
        """
        branches = self.branches
        for name in self.fields:
            if all(name in b.fields and "const" in b.fields[name].resolved for b in branches):
                return name
            tags = [b.fields[name].choices if name in b.fields else [] for b in branches]
            if len(branches) > 1 and all(tags) and len(set(chain(*tags))) == sum(map(len, tags)):
                return name
        return None

    @property
    def fields(self) -> dict[str, Node]:
        """Name -> node of each named field, over all alternatives."""
        found: dict[str, Node] = {}
        for branch in self.branches:
            for name, schema in branch.resolved.get("properties", {}).items():
                found.setdefault(name, self._at(schema))
        return found

    @property
    def values(self) -> Node | None:
        """The node of each value, where any key may stand (a mapping by name)."""
        for branch in self.branches:
            schema = branch.resolved
            found = [*schema.get("patternProperties", {}).values(), schema.get("additionalProperties")]
            if isinstance(found[0], dict):
                return self._at(found[0])
        return None

    @property
    def choices(self) -> list[Any]:
        """The values of a field that takes one of a few."""
        found: list[Any] = []
        for branch in self.branches:
            schema = branch.resolved
            found += [schema["const"]] if "const" in schema else schema.get("enum", [])
        return found

    @property
    def tags(self) -> list[str]:
        """The kinds of section there are, by what stands in `tag_field`."""
        name = self.tag_field
        return [str(tag) for branch in self.branches for tag in branch.fields[name].choices] if name else []

    @property
    def required(self) -> list[str]:
        """Fields without a default."""
        return [str(name) for branch in self.branches[:1] for name in branch.resolved.get("required", ())]

    @property
    def description(self) -> str:
        """The field's own words in one line, or nothing."""
        return " ".join(str(self.schema.get("description", "")).split())

    def child(self, part: str | int) -> Node | None:
        """Return the node of a field, of a mapping's value or of a list's entry."""
        if isinstance(part, str) and part in self.fields:
            return self.fields[part]
        if isinstance(part, int):
            for branch in self.branches:
                if "items" in branch.resolved:
                    return self._at(branch.resolved["items"])
        return self.values

    def rule(self) -> str:
        """Say in words what may stand here: `a whole number of at least 1`."""
        words: list[str] = []
        for branch in self.branches:
            said = _rule(branch.resolved)
            if said not in words:
                words.append(said)
        return " or ".join(words)


@cache
def root(model: type[BaseModel]) -> Node:
    """Return the node of a whole configuration file."""
    schema = model.model_json_schema()
    return Node(schema, schema.get("$defs", {}))


def dotted(path: Sequence[str | int]) -> str:
    """Write a path as people write it: `training.learning_rate`, `sites[2].name`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def suggest(top: Node, path: Sequence[str | int], siblings: Sequence[str]) -> str:
    """Say what was probably meant by the unknown field at the end of `path`.

    A misspelt sibling comes first, then a field of that name in another section, then a sibling that has the
    name in its own (`batch_size`); else the fields there are.
    """
    name, prefix = str(path[-1]), list(path[:-1])
    if close := get_close_matches(name, siblings, n=1, cutoff=0.7):
        return f"did you mean {dotted([*prefix, close[0]])}?"
    everywhere = [key for key in _keys(top, ()) if key != tuple(path)]
    if elsewhere := [key for key in everywhere if key[-1] == name]:
        return f"did you mean {dotted(elsewhere[0])}?"
    if len(name) > 3 and (longer := [key for key in everywhere if name in key[-1]]):
        return f"did you mean {' or '.join(dotted(key) for key in longer[:3])}?"
    names = {key[-1]: key for key in reversed(everywhere)}
    if close := get_close_matches(name, list(names), n=1, cutoff=0.8):
        return f"did you mean {dotted(names[close[0]])}?"
    return f"the fields here are {', '.join(siblings)}."


def suggest_choice(value: Any, choices: Sequence[Any]) -> str | None:
    """Say which of `choices` was probably meant."""
    close = get_close_matches(str(value), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else None


def _keys(node: Node, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, child in node.fields.items():
        yield (*path, name)
        yield from _keys(child, (*path, name))


def _rule(schema: Schema) -> str:
    if "const" in schema or "enum" in schema:
        choices = [schema["const"]] if "const" in schema else schema["enum"]
        return ("one of " if len(choices) > 1 else "") + ", ".join(str(choice) for choice in choices)
    words = _WORDS.get(schema.get("type", ""), "another kind of value")
    if schema.get("type") == "object" and (required := schema.get("required")):
        return f"a section with {', '.join(required)}"
    bounds = [
        f"{said} {_number(schema[key])}"
        for key, said in (
            ("exclusiveMinimum", "above"),
            ("minimum", "of at least"),
            ("exclusiveMaximum", "below"),
            ("maximum", "of at most"),
        )
        if key in schema
    ]
    if "minItems" in schema:
        bounds.append(f"of at least {schema['minItems']} entr{'y' if schema['minItems'] == 1 else 'ies'}")
    if schema.get("minLength", 0) > 1:
        bounds.append(f"of at least {schema['minLength']} characters")
    if "maxLength" in schema:
        bounds.append(f"of at most {schema['maxLength']} characters")
    if schema.get("minLength") == 1:
        words = "text that is not empty" + ("," if bounds else "")
    return " and ".join(
        [" ".join([words, *bounds[:1]]), *(bound.removeprefix("of ") for bound in bounds[1:])]
    )


def _number(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e6 else f"{value:.0f}"
