"""The YAML of files that people write: YAML 1.2's plain values, read safely, with the line of every value.

ruamel.yaml parses; what the parsed nodes mean is said here, because it still takes `010` and `1_000` for
numbers and `2024-01-01` for a date. Labels are what people write most in these files, so values mean here
what they look like: `true`/`false`, decimal numbers and `null` are those, everything else is text. What we
write is quoted wherever a reader of YAML 1.1 or 1.2 could read it otherwise.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import BaseResolver, implicit_resolvers

from quorate.shared.errors import ConfigError

MAX_BYTES = 4 * 2**20
"""A larger file is no run or sites file; someone named a data file by mistake."""
MAX_VALUES = 2**20
"""Most values of a file, those that an alias (`*name`) stands for counted each time: a few lines of aliases
to aliases can stand for more than any memory holds."""
Place = tuple[str | int, ...]
"""Where a value stands: the keys and indices that lead to it."""
Lines = Mapping[Place, int]

_REMEDIES = {
    "'\\t'": ": indent with spaces, not with tabs",
    "mapping values are not allowed": ": quote a text that holds `: `, and indent a section's fields alike",
    "<stream end>": ": a bracket or quote is not closed",
}
"""What to do about the commonest mistakes, by words of the parser's messages."""
_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_BOOLS = {"true": True, "false": False}
_PLAIN: dict[str, tuple[str, Iterable[str], Callable[[str], Any]]] = {
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)$", "tTfF", lambda text: _BOOLS[text.lower()]),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789", int),
    "float": (
        r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"
        r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$",
        "-+.0123456789",
        lambda text: float(text.lower().replace(".i", "i").replace(".n", "n")),
    ),
    "null": (r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""], lambda text: None),
    "merge": (r"<<$", "<", str),
}
"""What a plain value may be besides text: how it looks, its first character, what it is."""
_MADE: dict[str, Callable[[str], Any]] = {"str": str} | {tag: made for tag, (_, _, made) in _PLAIN.items()}


class _Reading(BaseResolver):
    """Tells which plain values are more than text, by `_PLAIN`."""

    processing_version = (1, 2)

    def __init__(self, version: Any = None, loader: Any = None) -> None:
        super().__init__(loader)


class _Writing(_Reading):
    """Tells which texts must be quoted: also what YAML 1.1 takes for more than text."""


class _Representer(SafeRepresenter):
    """Writes texts and numbers so that either version of YAML reads them back."""

    def text(self, text: str) -> Any:
        # Line breaks of any kind (U+0085, U+2028, ...) survive in double quotes alone.
        return self.represent_scalar(_TAG + "str", text, style=None if text.isprintable() else '"')

    def number(self, number: float) -> Any:
        node = self.represent_float(number)
        if "." not in node.value:  # YAML 1.1 takes 1e-05 for text
            node.value = node.value.replace("e", ".0e")
        return node


for _name, (_looks, _first, _) in _PLAIN.items():
    for _resolver in (_Reading, _Writing):
        _resolver.add_implicit_resolver_base(_TAG + _name, re.compile(_looks), list(_first))
for _versions, *_rule in implicit_resolvers:
    if (1, 1) in _versions:
        _Writing.add_implicit_resolver_base(*_rule)
_Representer.add_representer(str, _Representer.text)
_Representer.add_representer(float, _Representer.number)


def read_mapping(path: Path) -> tuple[dict[Any, Any], Lines]:
    """Read a YAML file whose content is one mapping; returns that, and on which line each value begins.

    Raises: ConfigError: the file cannot be read, is not UTF-8, is not YAML, or holds no mapping.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(
                f"{path}: {path.stat().st_size / 2**20:.0f} MiB is too large for a configuration file; "
                "is this the file you meant?"
            )
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 text.") from error
    except OSError as error:
        message = f"{path}: cannot be read: {error.strerror}; check the path."
        raise ConfigError(message, kind="config-unreadable") from error
    content, lines = _parse(text, str(path))
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise ConfigError(f"{path}: holds {found}; a configuration file is a list of `field: value` lines.")
    return content, lines


def parse(text: str, where: str) -> Any:
    """Parse one YAML document.

    Raises: ConfigError: naming `where`, line and column; the text itself is not quoted.
    """
    return _parse(text, where)[0]


def write_mapping(content: dict[str, Any]) -> str:
    """Return `content` as YAML that `read_mapping` reads back equal, fields in their order."""
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.Resolver, yaml.Representer = _Writing, _Representer
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output = False, False
    yaml.width, yaml.encoding = 2 * MAX_BYTES, None
    text = io.StringIO()
    yaml.dump(content, text)
    return text.getvalue()


def _parse(text: str, where: str) -> tuple[Any, Lines]:
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver = _Reading
    yaml.composer.warn_double_anchors = False
    content = _Content()
    try:
        node = yaml.compose(text)
        return None if node is None else content.value(node, (), ()), content.lines
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = error.problem or error.context
        remedy = next((remedy for sign, remedy in _REMEDIES.items() if sign in str(what)), "")
        raise ConfigError(f"{where}: {at}{what}; this is not valid YAML{remedy}.", kind="not-yaml") from error
    # The parser has no error of its own for an unknown version, and for characters that there are not.
    except (YAMLError, RecursionError, AssertionError, ValueError, OverflowError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{where}: {why}; this is not valid YAML.", kind="not-yaml") from error


class _Content:
    """Makes values of parsed nodes. What an alias stands for is made anew each time: nothing is shared."""

    def __init__(self) -> None:
        self.lines: dict[Place, int] = {}
        self.count = 0

    def value(self, node: Any, place: Place, within: tuple[Any, ...]) -> Any:
        """Return the value of a node that stands at `place`, within other nodes.

        Raises: MarkedYAMLError: it has a tag that means nothing here, a key twice, or no end.
        """
        self.count += 1
        if self.count > MAX_VALUES:
            raise _wrong(f"more than {MAX_VALUES} values, those behind aliases (*) counted each time", node)
        if node in within:
            raise _wrong("an anchor (&) contains itself; write the values out", node)
        within = (*within, node)
        made: Any
        if isinstance(node, MappingNode) and node.tag == f"{_TAG}map":
            made = self._section(node, place, within)
        elif isinstance(node, SequenceNode) and node.tag == f"{_TAG}seq":
            made = [self.value(each, (*place, index), within) for index, each in enumerate(node.value)]
        else:
            made = _scalar(node)
        self.lines[place] = node.start_mark.line + 1
        return made

    def _section(self, node: Any, place: Place, within: tuple[Any, ...]) -> dict[Any, Any]:
        section: dict[Any, Any] = {}
        for merged in _merged(node):
            section |= self.value(merged, place, within)
        own: dict[Any, int] = {}
        for key, value in node.value:
            if key.tag == _MERGE:
                continue
            if not isinstance(key, ScalarNode):
                raise _wrong("unhashable key; a key is a text or a number", key)
            name = _scalar(key)
            if name in own:
                raise _wrong(f"key {name!r} is given twice (first in line {own[name]}); keep one", key)
            own[name] = key.start_mark.line + 1
            section[name] = self.value(value, (*place, name), within)
            self.lines[(*place, name)] = own[name]
        return section


def _merged(node: Any) -> list[Any]:
    """Return what `<<` puts under a section's own keys; of several mappings the first is last: it wins."""
    found: list[Any] = []
    for key, value in node.value:
        if key.tag == _MERGE:
            found += reversed(value.value) if isinstance(value, SequenceNode) else [value]
    if wrong := [each for each in found if not isinstance(each, MappingNode)]:
        raise _wrong("expected a mapping or list of mappings for merging", wrong[0])
    return found


def _scalar(node: Any) -> Any:
    tag = node.tag.removeprefix(_TAG)
    if not isinstance(node, ScalarNode) or tag not in _MADE:
        raise _wrong(f"could not determine a constructor for the tag {node.tag!r}", node)
    try:
        return _MADE[tag](node.value)
    except (ValueError, KeyError) as error:
        raise _wrong(f"this is no {tag}: {error}", node) from error


def _wrong(problem: str, node: Any) -> MarkedYAMLError:
    return MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
