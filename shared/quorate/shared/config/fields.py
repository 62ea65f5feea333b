"""The fields of a configuration model, read off its JSON schema: what there is, what fits, what was meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core.core_schema import TaggedUnionSchema

Schema = Mapping[str, Any]
_WORDS = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "a section of `field: value` lines",
}
_BOUNDS = {
    "exclusiveMinimum": "above {:.15g}",
    "minimum": "of at least {:.15g}",
    "exclusiveMaximum": "below {:.15g}",
    "maximum": "of at most {:.15g}",
    "minItems": "of at least {} entries",
    "minLength": "of at least {} characters",
    "maxLength": "of at most {} characters",
}


class _WithTags(GenerateJsonSchema):
    """JSON schema that says, by tag, what the alternatives of a union are: locations of errors hold tags."""

    def tagged_union_schema(self, schema: TaggedUnionSchema) -> dict[str, Any]:
        tags = {str(tag): self.generate_inner(kind) for tag, kind in schema["choices"].items()}
        return {**super().tagged_union_schema(schema), "tags": tags}

    def sort(self, value: Any, parent_key: str | None = None) -> Any:
        """Keep the order in which fields and alternatives are written."""
        return value


@dataclass(frozen=True)
class Node:
    """One place in a configuration: the schema of what may stand there."""

    schema: Schema
    definitions: Schema

    def _at(self, schema: Schema) -> Node:
        return Node(schema, self.definitions)

    @property
    def resolved(self) -> Schema:
        """The schema with its reference followed and null left out; every other union has tags."""
        schema = self.schema
        if "anyOf" in schema:
            (schema,) = (part for part in schema["anyOf"] if part != {"type": "null"})
        return self.definitions[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema

    @property
    def kinds(self) -> dict[str, Node]:
        """The alternatives of a union, by pydantic's tags; none where it is no union."""
        return {tag: self._at(kind) for tag, kind in self.resolved.get("tags", {}).items()}

    @property
    def tag_field(self) -> str | None:
        """The field that says which kind of section this is (`name` of a rule), if there is one."""
        name = self.resolved.get("discriminator", {}).get("propertyName")
        return None if name is None else str(name)

    @property
    def _branches(self) -> list[Schema]:
        return [kind.resolved for kind in self.kinds.values()] or [self.resolved]

    @property
    def fields(self) -> dict[str, Node]:
        """Name -> node of each named field, over all alternatives."""
        found: dict[str, Node] = {}
        for branch in self._branches:
            for name, schema in branch.get("properties", {}).items():
                found.setdefault(name, self._at(schema))
        return found

    @property
    def choices(self) -> list[Any]:
        """The values of a field that takes one of a few."""
        return [value for branch in self._branches for value in _choices(branch)]

    @property
    def description(self) -> str:
        """The field's own words in one line, or nothing."""
        return " ".join(str(self.schema.get("description", "")).split())

    def child(self, part: str | int) -> Node | None:
        """Return the node of a field, of a mapping's value or of a list's entry."""
        schema = self.resolved
        found = (
            [schema.get("items")]
            if isinstance(part, int)
            else [
                schema.get("properties", {}).get(part),
                *schema.get("patternProperties", {}).values(),
                schema.get("additionalProperties"),
            ]
        )
        return next((self._at(each) for each in found if isinstance(each, Mapping)), None)

    def rule(self) -> str:
        """Say in words what may stand here: `a whole number of at least 1`."""
        return " or ".join(dict.fromkeys(_rule(branch) for branch in self._branches))


@cache
def root(model: type[BaseModel]) -> Node:
    """Return the node of a whole configuration file."""
    schema = model.model_json_schema(schema_generator=_WithTags)
    return Node(schema, schema.get("$defs", {}))


def dotted(path: Sequence[str | int]) -> str:
    """Write a path as people write it: `training.learning_rate`, `sites[2].name`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


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


def _choices(schema: Schema) -> list[Any]:
    return [schema["const"]] if "const" in schema else list(schema.get("enum", ()))


def _rule(schema: Schema) -> str:
    if choices := _choices(schema):
        return ("one of " if len(choices) > 1 else "") + ", ".join(map(str, choices))
    if schema.get("type") == "object" and (required := schema.get("required")):
        return f"a section with {', '.join(required)}"
    bounds = [said.format(schema[key]) for key, said in _BOUNDS.items() if key in schema]
    words = _WORDS.get(schema.get("type", ""), "another kind of value")
    if schema.get("minLength") == 1:
        bounds.remove("of at least 1 characters")
        words = "text that is not empty" + ("," if bounds else "")
    said = [" ".join([words, *bounds[:1]]), *(bound.removeprefix("of ") for bound in bounds[1:])]
    return " and ".join(said).replace(" 1 entries", " 1 entry")
