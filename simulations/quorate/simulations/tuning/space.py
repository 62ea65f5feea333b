"""The space file of `quorate tune`: which fields of the run file are searched, where, and how."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from quorate.shared.config.config_model import ConfigModel
from quorate.shared.config.fields import root, suggest
from quorate.shared.config.load import load_run
from quorate.shared.config.read import load_file
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ConfigError
from quorate.shared.seeds import rng

Value = (
    Annotated[
        Annotated[bool, Tag("bool")]
        | Annotated[int, Tag("int")]
        | Annotated[float, Tag("float")]
        | Annotated[str, Tag("str")],
        Discriminator(
            lambda value: next((t.__name__ for t in (bool, int, float) if type(value) is t), "str")
        ),
    ]
    | None
)
_FIXED = {
    "name": "it changes nothing",
    "seed": "a seed is chance, and the luckiest one is no better model; see `quorate compare`",
    "data": "trials on other rows cannot be compared",
    "evaluation": "trials that are measured differently cannot be compared",
    "save_total_limit": "it changes nothing",
    "report_to": "it changes nothing",
}
"""Fields that cannot be searched, and why."""


class FloatRange(ConfigModel):
    """A number between two others."""

    type: Literal["float"]
    """The kind of parameter."""
    low: float
    """Smallest value."""
    high: float
    """Largest value."""
    log: bool = False
    """Draw its logarithm evenly: for learning rates and the like."""
    step: float | None = Field(None, gt=0)
    """Distance between values; any number when left out."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        _check_range(self.low, self.high, self.log, self.step is not None)
        return self

    @property
    def bounds(self) -> tuple[Value, ...]:
        """What must be allowed in a run for the whole range to be."""
        return self.low, self.high

    @property
    def points(self) -> list[Value]:
        """Every value, where there are finitely many; else none."""
        if self.step is None:
            return []
        count = int((self.high - self.low) / self.step + 1e-9) + 1
        return [round(self.low + index * self.step, 12) for index in range(count)]


class IntRange(ConfigModel):
    """A whole number between two others."""

    type: Literal["int"]
    """The kind of parameter."""
    low: int
    """Smallest value."""
    high: int
    """Largest value."""
    log: bool = False
    """Draw its logarithm evenly: for ranks, batch sizes and the like."""
    step: int = Field(1, ge=1)
    """Distance between values."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        _check_range(self.low, self.high, self.log, self.step != 1)
        return self

    @property
    def bounds(self) -> tuple[Value, ...]:
        return self.low, self.high

    @property
    def points(self) -> list[Value]:
        return list(range(self.low, self.high + 1, self.step))


class Choices(ConfigModel):
    """One of a few values."""

    type: Literal["categorical"]
    """The kind of parameter."""
    choices: tuple[Value, ...] = Field(min_length=2)
    """The values."""

    @model_validator(mode="after")
    def _differ(self) -> Self:
        written = [json.dumps(choice) for choice in self.choices]
        if twice := [each for each in written if written.count(each) > 1]:
            raise ValueError(f"choice {twice[0]} is listed twice")
        return self

    @property
    def bounds(self) -> tuple[Value, ...]:
        """What must be allowed in a run: every choice."""
        return self.choices

    @property
    def points(self) -> list[Value]:
        return list(self.choices)


Parameter = Annotated[FloatRange | IntRange | Choices, Field(discriminator="type")]


class SpaceConfig(ConfigModel):
    """A search: its space, and how it goes about it."""

    space: dict[str, Parameter] = Field(min_length=1)
    """Dotted field of the run file -> where to search it."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """How the next trial is chosen: learning from those before (arXiv:2304.11127), at random, or every
    combination in random order."""
    pruner: Literal["none", "median", "hyperband"] = "median"
    """Which trials are stopped early: none; those whose best round so far is worse than the median of the
    others at that round; or by successive halving over rounds (arXiv:1603.06560)."""
    trials: int = Field(20, ge=1)
    """Number of trials, pruned and failed ones included; `--trials` takes its place. A grid ends earlier."""
    startup_trials: int = Field(5, ge=1)
    """Trials before `tpe` learns and before `median` stops any."""
    warmup_rounds: int = Field(1, ge=0)
    """Rounds of a trial in which `median` does not stop it."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the search. Every trial has the run's own seed."""

    @model_validator(mode="after")
    def _grid_is_finite(self) -> Self:
        endless = [key for key, each in self.space.items() if not each.points or getattr(each, "log", False)]
        if self.sampler == "grid" and endless:
            message = f"a grid needs a list of values for {endless[0]}: give choices, or a step and no log"
            raise ValueError(message)
        return self

    def grid(self) -> list[dict[str, Value]]:
        """Return every combination of a grid, in the order in which they are tried."""
        names, values = list(self.space), [each.points for each in self.space.values()]
        found = [dict(zip(names, point, strict=True)) for point in itertools.product(*values)]
        return [found[index] for index in rng(self.seed, "grid").permutation(len(found)).tolist()]


def load_space(path: Path, run_path: Path, overrides: Sequence[str] = ()) -> SpaceConfig:
    """Read a space file and check it against the run file it is for.

    Raises: ConfigError: every problem, a line each: an unknown field of the run file, one that cannot be
        searched, or a value that cannot stand in the run.
    """
    space = load_file(SpaceConfig, path)
    problems: list[str] = []
    for key, parameter in space.space.items():
        if (wrong := _unknown(key)) is not None:
            problems.append(f"{path}: space: {key}: {wrong}")
            continue
        for value in parameter.bounds:
            try:
                load_run(run_path, [*overrides, *as_overrides({key: value})])
            except ConfigError as error:
                problems += [f"{path}: space: {key}: {value!r} cannot stand there: {error}"]
    if problems:
        raise ConfigError("\n".join(problems))
    return space


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """Return values as `key=value`, as the command line takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _unknown(key: str) -> str | None:
    """Say what is wrong with a key: not in a run file, or not to be searched."""
    parts = tuple(key.split("."))
    if parts[0] in _FIXED:
        return f"cannot be searched: {_FIXED[parts[0]]}; take it out."
    top = node = root(RunConfig)
    for depth, part in enumerate(parts):
        if part not in node.fields:
            return f"the run file has no such field; {suggest(top, parts[: depth + 1], list(node.fields))}"
        node = node.fields[part]
    return None


def _check_range(low: float, high: float, log: bool, stepped: bool) -> None:
    if low >= high:
        raise ValueError(f"low {low} is not below high {high}")
    if log and low <= 0:
        raise ValueError(f"log needs low above 0, not {low}")
    if log and stepped:
        raise ValueError("log and step do not go together; keep one")
