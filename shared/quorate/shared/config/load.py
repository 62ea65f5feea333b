"""Reading run and sites files: YAML, `key=value` overrides, and errors that a person can act on.

A run file says everything that shapes a run; `load_run` reads it, puts the overrides of the command line over
it, and validates the whole. `read.dump_yaml` writes the resolved configuration, which reads back equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quorate.shared.config.config_model import ConfigModel
from quorate.shared.config.dialect import parse, read_mapping
from quorate.shared.config.fields import Node, dotted, root, suggest
from quorate.shared.config.read import load_file, validate
from quorate.shared.config.run_config import RunConfig
from quorate.shared.config.sites_config import SitesConfig
from quorate.shared.errors import ConfigError


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and validate a run file.

    Args:
        path: the YAML file.
        overrides: `key=value` each, the key dotted (`training.learning_rate=3e-3`), the value YAML
            (`task.labels=[a, b]`); they replace what the file says.
    Raises: ConfigError: one error that lists every problem, a line each.
    """
    content, lines = read_mapping(path)
    changed, problems = [], []
    for override in overrides:
        try:
            changed.append(_apply(content, override))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return validate(RunConfig, content, str(path), lines, changed)


def load_sites_file(path: Path) -> SitesConfig:
    """Read and validate a sites file.

    Raises: ConfigError: one error that lists every problem, a line each.
    """
    return load_file(SitesConfig, path)


def schema(model: type[ConfigModel] = RunConfig, kind: str = "run") -> dict[str, Any]:
    """Return the JSON schema of a kind of file, for editors to complete and check it.

    Args:
        model: what the file is read into.
        kind: word for it, for the schema's title.
    """
    described = {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}
    return {**described, "title": f"Quorate {kind} file"}


def _apply(content: dict[Any, Any], override: str) -> tuple[str, ...]:
    """Put one override into the raw content; returns the path it set."""
    key, equals, text = override.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise ConfigError(
            f"command line: {override!r} is not an override; "
            "write key=value, for instance training.max_steps=8."
        )
    value = parse(text, f"command line: {key}")
    _check_known(path)
    node, section = root(RunConfig), content
    for part in path[:-1]:
        node = node.fields[part]
        inner = section.get(part)
        if inner is None:
            inner = _section(node)
        elif not isinstance(inner, dict):
            raise ConfigError(
                f"command line: {key}: {part} is no section in the file; "
                f"mend it there, or set it whole: {part}={{...}}."
            )
        section[part] = inner
        section = inner
    section[path[-1]] = value
    return path


def _check_known(path: tuple[str, ...]) -> None:
    """Raise ConfigError, with the nearest valid key, if the run file has no such field."""
    top = node = root(RunConfig)
    for depth, part in enumerate(path):
        if part in node.fields:
            node = node.fields[part]
            continue
        where = f"command line: {dotted(path)}"
        if not node.fields:
            whole = dotted(path[:depth])
            raise ConfigError(f"{where}: {whole} has no fields of its own; set it whole: {whole}=...")
        meant = suggest(top, path[: depth + 1], list(node.fields))
        raise ConfigError(f"{where}: there is no such field; {meant}")


def _section(node: Node) -> dict[str, Any]:
    """Return a new section; of several kinds, the default's."""
    default = node.schema.get("default")
    kind = node.tag_field
    return {kind: default[kind]} if kind and isinstance(default, dict) and kind in default else {}
