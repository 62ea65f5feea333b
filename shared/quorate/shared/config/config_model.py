"""The base of every configuration model (frozen, no unknown fields, one JSON form), and names in them."""

from __future__ import annotations

import hashlib
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Discriminator, StringConstraints, Tag

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
Name = Annotated[str, StringConstraints(pattern=NAME)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
ONE, LIST = Tag("one"), Tag("list")
ONE_OR_LIST = Discriminator(lambda value: "list" if isinstance(value, (list, tuple)) else "one")
"""Tells a union of a value (tagged `ONE`) and a list (`LIST`) apart: `Annotated[... | ..., ONE_OR_LIST]`.

Unions in configuration models say by themselves which alternative is meant, by a field or by this, so that an
error is about that one alone.
"""


class ConfigModel(BaseModel):
    """A frozen pydantic model that refuses unknown fields and has a hash of its content."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    def canonical_json(self) -> str:
        """Return the one JSON text of this configuration (defaults written out, field order fixed)."""
        return self.model_dump_json()

    @property
    def content_hash(self) -> str:
        """SHA-256 of the canonical JSON, in hex."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()


class UnboundedModel(ConfigModel):
    """One whose figures may be infinite, which JSON has no number for and so is written as a string."""

    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="strings")
