"""Reading and writing any kind of configuration file; `load` adds what run files have besides."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from quorate.shared.config.config_model import ConfigModel
from quorate.shared.config.dialect import Lines, Place, read_mapping, write_mapping
from quorate.shared.config.explain import explain
from quorate.shared.errors import ConfigError

_M = TypeVar("_M", bound=ConfigModel)


def load_file(model: type[_M], path: Path) -> _M:
    """Read and validate any configuration file.

    Raises: ConfigError: one error that lists every problem, a line each.
    """
    content, lines = read_mapping(path)
    return validate(model, content, str(path), lines)


def dump_yaml(model: ConfigModel) -> str:
    """Return a configuration as YAML with all defaults written out; loading it gives an equal model."""
    return write_mapping(model.model_dump(mode="json"))


def validate(
    model: type[_M], content: dict[Any, Any], where: str, lines: Lines, overridden: Collection[Place] = ()
) -> _M:
    """Return the configuration that `content` makes.

    Args:
        model: what it is to be.
        content: as read.
        where: the file, for messages.
        lines: of the file.
        overridden: paths of fields that the command line set.
    Raises: ConfigError: one error that lists every problem, a line each.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigError(explain(error, model, where, lines, overridden)) from error
