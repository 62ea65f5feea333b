r"""Which arrays of an adapter a run's patterns name: the frozen ones, and those with a pace of their own.

A pattern is read as PEFT reads `target_modules`: it names an array, or a module above it, by the ending of
its name (`query`, `classifier`, `attention.self.query`, `lora_A`) or as a regular expression that matches the
whole name (`.*layer\.[01]\..*`). Names are those inside the base model, without `base_model.model.`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from quorate.shared.adapters.adapter import Adapter
from quorate.shared.adapters.patterns import check_cost
from quorate.shared.aggregation import GlobalState
from quorate.shared.config.run_config import RunConfig, TrainingConfig
from quorate.shared.errors import ConfigError

# PEFT's for `layers_to_transform`: lazy, as the first number is the layer's and a later one an expert's.
_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` names the array `name` or a module that it is in."""
    return any(
        path == pattern or path.endswith(f".{pattern}") or re.fullmatch(pattern, path)
        for path in _paths(name)
    )


def layer_index(name: str) -> int | None:
    """Return the index of the base model's layer that a LoRA array adapts; None for other arrays."""
    found = _LAYER.match(_plain(name)) if ".lora_" in name else None
    return int(found["idx"]) if found else None


def frozen(training: TrainingConfig, names: Iterable[str]) -> frozenset[str]:
    """Return the arrays that stay at their start.

    Raises: ConfigError: a pattern that names no array, more layers than there are, or nothing left to train.
    """
    names = list(names)
    _check_cost("training.freeze", training.freeze, names)
    still = {name for pattern in training.freeze for name in _named("training.freeze", pattern, names)}
    if training.freeze_layers:
        layers = _layers(names)
        if training.freeze_layers > len(layers):
            raise ConfigError(
                f"training.freeze_layers: {training.freeze_layers} is above the {len(layers)} layers that "
                f"have an adapter ({', '.join(map(str, layers)) or 'none has a number'}); lower it.",
                kind="too-many-layers",
            )
        below = set(layers[: training.freeze_layers])
        still |= {name for name in names if layer_index(name) in below}
    if names and len(still) == len(names):
        message = "training.freeze and training.freeze_layers leave nothing to train; freeze fewer arrays."
        raise ConfigError(message, kind="all-frozen")
    return frozenset(still)


def rate_factors(training: TrainingConfig, names: Iterable[str]) -> dict[str, float]:
    """Return each array's factor on the learning rate.

    The factors of all patterns that name an array are multiplied, so their order says nothing. With
    `layer_lr_decay` d, layer i of n gets d ** (n - 1 - i); arrays outside the layers, as the head, get 1.

    Raises: ConfigError: a pattern that names no array.
    """
    factors = dict.fromkeys(names, 1.0)
    _check_cost("training.learning_rates", training.learning_rates, list(factors))
    for pattern, factor in training.learning_rates.items():
        for name in _named("training.learning_rates", pattern, list(factors)):
            factors[name] *= factor
    if training.layer_lr_decay != 1:
        layers = _layers(factors)
        for name in factors:
            index = layer_index(name)
            if index is not None:
                factors[name] *= training.layer_lr_decay ** (layers[-1] - index)
    return factors


def moving(run: RunConfig, names: Iterable[str], round: int) -> frozenset[str]:
    """Return the arrays that sites train in `round`: those the rule trains, but the frozen ones."""
    names = list(names)
    still = frozen(run.training, names)
    trained = run.aggregation.trainable((name for name in names if name not in still), round)
    if not trained:
        raise ConfigError(
            f"aggregation {run.aggregation.name} trains nothing of what training.freeze and "
            "training.freeze_layers leave; freeze fewer arrays.",
            kind="rule-trains-nothing",
        )
    return trained


def uploaded(run: RunConfig, trained: Adapter, received: GlobalState, round: int) -> Adapter:
    """Return what leaves a site: the rule's upload, of an adapter that lacks the frozen arrays."""
    still = frozen(run.training, trained)
    kept = trained.subset(name for name in trained if name not in still)
    return run.aggregation.upload(kept, received, round)


def upload_schema(
    run: RunConfig, schema: Mapping[str, tuple[int, ...]], round: int
) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of what `uploaded` returns."""
    still = frozen(run.training, schema)
    kept = {name: shape for name, shape in schema.items() if name not in still}
    return run.aggregation.upload_schema(kept, round)


def download_schema(
    run: RunConfig, schema: Mapping[str, tuple[int, ...]], round: int
) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the adapter's arrays in what `downloaded` returns."""
    kept = {name: schema[name] for name in schema.keys() - frozen(run.training, schema)}
    names = run.aggregation.sent(kept, round)
    return {name: shape for name, shape in kept.items() if name in names}


def downloaded(run: RunConfig, state: GlobalState, round: int) -> Adapter:
    """Return what is sent to a site, which has the frozen arrays from its seeded start."""
    still = frozen(run.training, state.adapter)
    arrays = run.aggregation.download(state, round)
    return arrays.subset(name for name in arrays if name not in still)


def check_patterns(run: RunConfig, names: Iterable[str]) -> None:
    """Raise ConfigError where a run's patterns do not fit the adapter's arrays or its rule."""
    names = list(names)
    trained = moving(run, names, 1)
    rate_factors(run.training, names)
    for pattern in run.training.learning_rates:
        if not any(matches(pattern, name) for name in trained):
            message = f"training.learning_rates: {pattern!r} names frozen arrays alone; leave it out."
            raise ConfigError(message, kind="names-frozen")
    still = frozen(run.training, names)
    halves = {name.rpartition(".lora_")[0] for name in still if ".lora_A" in name} ^ {
        name.rpartition(".lora_")[0] for name in still if ".lora_B" in name
    }
    if halves and not run.aggregation.linear:
        raise ConfigError(
            f"training.freeze freezes one factor of {_plain(min(halves))}, but aggregation "
            f"{run.aggregation.name} needs both of a layer; freeze the whole layer, or choose fedavg or ffa.",
            kind="half-frozen",
        )


def _check_cost(field: str, patterns: Collection[str], names: list[str]) -> None:
    """Raise ConfigError where matching these patterns would take long."""
    if patterns:
        check_cost(field, patterns, dict.fromkeys(path for name in names for path in _paths(name)))


def _paths(name: str) -> list[str]:
    """Return the names of an array and of the modules that it is in, outermost first."""
    parts = _plain(name).split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _named(field: str, pattern: str, names: list[str]) -> list[str]:
    found = [name for name in names if matches(pattern, name)]
    if not found:
        shown = ", ".join(_plain(name) for name in names[:12])
        more = f" and {len(names) - 12} more" if len(names) > 12 else ""
        message = f"{field}: {pattern!r} names no array of the adapter; it has {shown}{more}."
        raise ConfigError(message, kind="names-nothing")
    return found


def _layers(names: Iterable[str]) -> list[int]:
    """Return the indices of the layers that have an adapter, ascending."""
    return sorted({index for name in names if (index := layer_index(name)) is not None})


def _plain(name: str) -> str:
    """Return the name inside the base model, also of a parameter of PEFT's own module."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".")
