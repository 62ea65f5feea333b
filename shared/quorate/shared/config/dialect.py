"""The YAML of run and sites files: YAML 1.2's plain values, read safely, duplicate keys refused.

PyYAML speaks YAML 1.1, in which a label `no` is a boolean, `12:30` the number 750, `010` the number 8 and
`3e-3` a text. Labels are what people write most in these files, so values mean here what they look like:
`true`/`false`, decimal numbers and `null` are those, everything else is text. What we write is quoted
wherever either version could read it otherwise.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from quorate.shared.errors import ConfigError

MAX_BYTES = 4 * 2**20
"""A larger file is no run or sites file; someone named a data file by mistake."""

_REMEDIES = {
    "'\\t'": ": indent with spaces, not with tabs",
    "mapping values are not allowed": ": quote a text that holds `: `, and indent a section's fields alike",
    "<stream end>": ": a bracket or quote is not closed",
}
"""What to do about the commonest mistakes, by words of PyYAML's messages."""
_MERGE = "tag:yaml.org,2002:merge"
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)$")
_FLOAT = re.compile(
    r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the plain values of YAML 1.2 and without duplicate keys."""

    yaml_implicit_resolvers = {}

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        """Compose a mapping, refusing a key that stands in it twice."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            if (first := lines.get((key.tag, key.value))) is not None:
                problem = f"key {key.value!r} is given twice (first in line {first}); keep one"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            lines[key.tag, key.value] = key.start_mark.line + 1
        return node


class _Dumper(yaml.SafeDumper):
    """SafeDumper (which quotes what YAML 1.1 would misread) that also quotes what YAML 1.2 would."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Line breaks of any kind (U+0085, U+2028, ...) survive in double quotes alone.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("tag:yaml.org,2002:int", _INT, "-+0123456789"),
    ("tag:yaml.org,2002:float", _FLOAT, "-+.0123456789"),
    ("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    (_MERGE, re.compile(r"<<$"), "<"),
):
    _Loader.add_implicit_resolver(_tag, _pattern, list(_first))
    _Dumper.add_implicit_resolver(_tag, _pattern, list(_first))


def read_mapping(path: Path) -> dict[Any, Any]:
    """Read a YAML file whose content is one mapping.

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
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; check the path.") from error
    content = parse(text, str(path))
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise ConfigError(f"{path}: holds {found}; a configuration file is a list of `field: value` lines.")
    return content


def parse(text: str, where: str) -> Any:
    """Parse one YAML document.

    Raises: ConfigError: naming `where`, line and column; the text itself is not quoted.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = error.problem or error.context
        remedy = next((remedy for sign, remedy in _REMEDIES.items() if sign in str(what)), "")
        raise ConfigError(f"{where}: {at}{what}; this is not valid YAML{remedy}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{where}: {what}; this is not valid YAML.") from error


def write_mapping(content: dict[str, Any]) -> str:
    """Return `content` as YAML that `read_mapping` reads back equal, fields in their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
