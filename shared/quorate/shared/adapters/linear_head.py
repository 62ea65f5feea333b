"""A head of one linear layer as arrays of the adapter: what `adapter.head.init: analytic` solves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quorate.shared.adapters.adapter import Adapter, saved_modules
from quorate.shared.adapters.selection import download_schema
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ConfigError, ModelError

MOST_FEATURES = 2048
"""Widest features whose products are sent: 2049**2 numbers are 34 MB, and validation rows double that."""
_PREFIX = "base_model.model."
_REMEDY = "choose adapter.head.init: random"


@dataclass(frozen=True)
class LinearHead:
    """A layer from features to outputs.

    Args:
        name: of the module inside the base model.
        features: that it takes.
        outputs: that it gives.
    """

    name: str
    features: int
    outputs: int

    @property
    def weight(self) -> str:
        """Name of the adapter's array [outputs, features]."""
        return f"{_PREFIX}{self.name}.weight"

    @property
    def bias(self) -> str:
        """Name of the adapter's array [outputs]."""
        return f"{_PREFIX}{self.name}.bias"

    def arrays(self, coefficients: npt.NDArray[np.float64]) -> Adapter:
        """Return the two arrays of a solution [features + 1, outputs], whose last row is the bias."""
        solved = coefficients.astype(np.float32)
        return Adapter({self.weight: np.ascontiguousarray(solved[:-1].T), self.bias: solved[-1].copy()})


def find_head(run: RunConfig, schema: Mapping[str, tuple[int, ...]]) -> LinearHead:
    """Return the head among the arrays of a run's adapter.

    Args:
        run: names what is trained whole beside the head (`adapter.modules_to_save`).
        schema: name -> shape of the adapter's arrays.
    Raises: ModelError: the head is not one linear layer with a bias, or its features are too wide.
        ConfigError: its arrays stay at their start.
    """
    beside = run.adapter.modules_to_save or ()
    found = [name for name in saved_modules(schema) if not any(_within(name, each) for each in beside)]
    if len(found) != 1:
        layers = f"several layers ({', '.join(found)})" if found else "none that the task trains by itself"
        raise ModelError(
            f"adapter.head.init analytic solves one linear layer, and the head is {layers}; {_REMEDY}.",
            kind="head-not-one-layer",
        )
    shape = schema.get(f"{_PREFIX}{found[0]}.weight", ())
    bias = schema.get(f"{_PREFIX}{found[0]}.bias", ())
    if len(shape) != 2 or bias != shape[:1]:
        raise ModelError(
            f"adapter.head.init analytic solves one linear layer with a bias, which {found[0]} is not; "
            f"{_REMEDY}.",
            kind="head-not-linear",
        )
    head = LinearHead(found[0], features=shape[1], outputs=shape[0])
    if head.features > MOST_FEATURES:
        raise ModelError(
            f"adapter.head.init analytic: {head.name} takes {head.features} features, and sums over products "
            f"of more than {MOST_FEATURES} are too large to send; {_REMEDY}.",
            kind="head-too-wide",
        )
    if not {head.weight, head.bias} <= download_schema(run, schema, 1).keys():
        raise ConfigError(
            f"adapter.head.init analytic: the arrays of {head.name} stay at their start and are not sent "
            "(training.freeze, or the rule), so nobody would get the solved ones; take the head out of "
            f"training.freeze, or {_REMEDY}.",
            kind="head-not-sent",
        )
    return head


def _within(name: str, ending: str) -> bool:
    """Whether a module, or one above it, has this name or one that ends in it."""
    parts = name.split(".")
    above = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return any(f".{each}".endswith(f".{ending}") for each in above)
