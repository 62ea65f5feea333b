"""What a run with site-level privacy will cost the sites of a sites file, before any of it is spent."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from pydantic import ValidationError

from quorate.client.privacy.forecast import Schema, peak_memory, seconds_a_step, traffic
from quorate.client.trainer.dp.plan import steps_a_round
from quorate.client.trainer.stack import AdapterStack
from quorate.server.privacy.central_plan import client_plan, most_releases, useless
from quorate.server.privacy.released import ClientPlan, ReleaseLedger
from quorate.shared.config.config_model import UnboundedModel
from quorate.shared.config.privacy_config import ClientPrivacy
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ConfigError
from quorate.shared.model.lora_model import LoadedModel, adapter_schema, load_model
from quorate.shared.privacy.accounting import epsilon
from quorate.shared.privacy.run_cost import BYTES_PER_VALUE, of_rank
from quorate.shared.tasks.task import Row


class ClientPlanForecast(UnboundedModel):
    """One choice of settings, and what follows from it; epsilon may be infinite."""

    change: str
    """What differs from the run file: `as configured`, `half the rank`, `twice the rounds`, ..."""
    rounds: int
    sampling_probability: float
    """Chance of a site to be drawn for a round."""
    expected_cohort: float
    """Sites expected in a round."""
    releases: int
    """Noised models that the site with most of them pays for."""
    noise_multiplier: float
    """z of a round."""
    sum_multiplier: float
    """Noise on the sum over the clipping norm: z, more with adaptive clipping."""
    epsilon: float
    """After all rounds, by privacy loss distributions."""
    noise_on_mean: float
    """Expected norm of the noise on the mean update over the clipping norm; above 1 it drowns updates."""
    trained_values: int
    """Numbers that are trained, noised and sent."""
    bytes_each_way: int
    """Adapter bytes that a site sends in a round, and as many that it receives, without headers."""


class ClientForecast(UnboundedModel):
    """What `quorate forecast` prints for site-level privacy."""

    run: str
    sites: int
    delta: float
    """Probability with which the claim may fail."""
    clipping_norm: float
    """L2 norm to which updates are clipped in round 1."""
    participation_hidden: bool
    """Whether nobody but the server learns who is drawn, so that the chance of not being drawn counts."""
    configured: ClientPlanForecast
    warning: str | None
    """What the server will warn of before round 1: noise that no update comes through."""
    alternatives: tuple[ClientPlanForecast, ...]
    """Rank, rounds and sites in a round, each halved and doubled, where that is possible."""
    impossible: dict[str, str]
    """Other settings that a run would refuse: change -> why."""
    bytes_up: int
    """Adapter bytes that all sites are expected to send in all rounds, without headers."""
    bytes_down: int
    """Adapter bytes that they receive in all rounds, for training and for validation, without headers, the
    test and the delivery of the result."""
    device: str | None = None
    """Where steps were measured."""
    minutes: float | None = None
    """Estimate of all expected sites' training in all rounds on this machine, one site after the other;
    without evaluation."""
    peak_memory_bytes: int | None = None
    """The most memory that this process held until the last step (on CUDA: that was allocated there)."""


def forecast_clients(
    run: RunConfig,
    rows: Mapping[str, Sequence[Row]],
    *,
    measure: bool = True,
    device: torch.device | None = None,
) -> ClientForecast:
    """Forecast a run with site-level privacy.

    Args:
        rows: site -> training rows.
        measure: whether to load the base model and take a few steps of the largest site, thrown away, for
            minutes and memory.
        device: where to; the first visible GPU, else the CPU, when left out.
    Raises: ConfigError: delta is too large for so many sites, or the noise asked for cannot be had.
        DataError: a row the task cannot use. ModelError: the base does not load.
    """
    privacy, names = run.privacy, rows.keys()
    assert isinstance(privacy, ClientPrivacy), "only called where it is"
    model = load_model(run, device=device) if measure else None
    schema = model.initial.schema if model else adapter_schema(run)
    plan = client_plan(run, names, schema)
    configured = _shown("as configured", run, names, plan)
    minutes = None
    if model:
        minutes = configured.rounds * configured.sampling_probability * _seconds_of_all(run, rows, model) / 60
    alternatives, impossible = _others(run, names, schema)
    up, down = traffic(run, schema, plan.sampling_probability)
    return ClientForecast(
        run=run.name,
        sites=len(rows),
        delta=privacy.delta,
        clipping_norm=privacy.clipping_norm,
        participation_hidden=privacy.participation_hidden,
        configured=configured,
        warning=useless(plan),
        alternatives=alternatives,
        impossible=impossible,
        bytes_up=len(rows) * up,
        bytes_down=len(rows) * down,
        device=str(model.peft.device) if model else None,
        minutes=minutes,
        peak_memory_bytes=peak_memory(model) if model else None,
    )


def _shown(change: str, run: RunConfig, names: Collection[str], plan: ClientPlan) -> ClientPlanForecast:
    assert isinstance(run.privacy, ClientPrivacy), "as above"
    releases = most_releases(run, ReleaseLedger(plan=plan), names, 1)
    return ClientPlanForecast(
        change=change,
        rounds=run.federation.rounds,
        sampling_probability=plan.sampling_probability,
        expected_cohort=plan.expected_cohort,
        releases=releases,
        noise_multiplier=plan.noise_multiplier,
        sum_multiplier=plan.sum_multiplier,
        epsilon=epsilon(plan.events(releases), run.privacy.delta),
        noise_on_mean=plan.noise_on_mean,
        trained_values=plan.values,
        bytes_each_way=BYTES_PER_VALUE * plan.values,
    )


def _others(
    run: RunConfig, names: Collection[str], schema: Schema
) -> tuple[tuple[ClientPlanForecast, ...], dict[str, str]]:
    """Return the plans with one setting halved or doubled, and why others cannot be had."""
    plans, impossible = [], {}
    for change, federation, shapes in _changes(run, len(names), schema):
        try:
            other = RunConfig.model_validate(
                {**dict(run), "federation": {**dict(run.federation), **federation}}
            )
            plans.append(_shown(change, other, names, client_plan(other, names, shapes)))
        except ValidationError as error:  # such as a quorum above the sites in a round
            impossible[change] = error.errors()[0]["msg"].removeprefix("Value error, ")
        except ConfigError as error:  # such as too few sites in a round for adaptive clipping
            impossible[change] = str(error)
    return tuple(plans), impossible


def _changes(run: RunConfig, sites: int, schema: Schema) -> Iterator[tuple[str, dict[str, int], Schema]]:
    """Yield what is changed, in words, and federation settings and shapes that do it."""
    for how, rank in (("half", lambda r: r // 2 if r % 2 == 0 else None), ("twice", lambda r: 2 * r)):
        shapes = of_rank(schema, rank)
        if shapes is not None:
            yield f"{how} the rank", {}, shapes
    rounds, cohort = run.federation.rounds, min(run.federation.sites_per_round or sites, sites)
    for what, field, number, most in (
        ("rounds", "rounds", rounds, math.inf),
        ("sites in a round", "sites_per_round", cohort, sites),
    ):
        if number % 2 == 0:
            yield f"half the {what}", {field: number // 2}, schema
        if 2 * number <= most:
            yield f"twice the {what}", {field: 2 * number}, schema


def _seconds_of_all(run: RunConfig, rows: Mapping[str, Sequence[Row]], model: LoadedModel) -> float:
    """Return the time of one round of training at every site, by steps at the largest [s]."""
    training = run.training
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    largest = max(rows, key=lambda site: len(rows[site]))
    second = seconds_a_step(run, AdapterStack.install(model), largest, rows[largest])
    return second * sum(steps_a_round(training, len(each), batch) for each in rows.values())
