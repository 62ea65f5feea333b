"""What a run with site-level privacy will cost the sites of a sites file, before any of it is spent."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod

import torch
from pydantic import ConfigDict

from quorate.client.forecast import peak_memory, seconds_a_step
from quorate.client.trainer.private_plan import steps_a_round
from quorate.client.trainer.stack import AdapterStack
from quorate.server.client_plan import client_plan, most_releases
from quorate.server.releases import Ledger
from quorate.shared.config.base import ConfigModel
from quorate.shared.config.privacy import ClientPrivacy
from quorate.shared.config.run import RunConfig
from quorate.shared.errors import ConfigError
from quorate.shared.model import LoadedModel, load_model
from quorate.shared.privacy.accounting import epsilon
from quorate.shared.privacy.forecast import BYTES_PER_VALUE, of_rank
from quorate.shared.selection import upload_schema
from quorate.shared.tasks.base import Row

Schema = Mapping[str, tuple[int, ...]]


class ClientPlanForecast(ConfigModel):
    """One choice of settings, and what follows from it; epsilon may be infinite."""

    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="strings")

    change: str
    """What differs from the run file: `as configured`, `half the rank`, `twice the rounds`, ..."""
    rounds: int
    """Rounds of the run."""
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


class ClientForecast(ConfigModel):
    """What `quorate forecast` prints for site-level privacy."""

    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="strings")

    run: str
    """Name of the run file."""
    sites: int
    """Sites of the sites file."""
    delta: float
    """Probability with which the claim may fail."""
    clipping_norm: float
    """L2 norm to which updates are clipped in round 1."""
    configured: ClientPlanForecast
    """As the run file says."""
    alternatives: tuple[ClientPlanForecast, ...]
    """Rank, rounds and sites in a round, each halved and doubled, where that is possible."""
    device: str
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
    """Forecast a run with site-level privacy. Loads the base model, for the arrays that the run trains.

    Args:
        run: the run.
        rows: site -> training rows.
        measure: whether to take a few steps of the largest site, thrown away, for minutes and memory.
        device: where to; the first visible GPU, else the CPU, when left out.
    Raises: ConfigError: delta is too large for so many sites, or the noise asked for cannot be had.
        DataError: a row the task cannot use. ModelError: the base does not load.
    """
    privacy = run.privacy
    assert isinstance(privacy, ClientPrivacy), "only called where it is"
    model = load_model(run, device=device)
    configured = _plan("as configured", run, rows.keys(), model.initial.schema)
    minutes = None
    if measure:
        minutes = configured.rounds * configured.sampling_probability * _seconds_of_all(run, rows, model) / 60
    return ClientForecast(
        run=run.name,
        sites=len(rows),
        delta=privacy.delta,
        clipping_norm=privacy.clipping_norm,
        configured=configured,
        alternatives=tuple(_others(run, rows.keys(), model.initial.schema)),
        device=str(model.peft.device),
        minutes=minutes,
        peak_memory_bytes=peak_memory(model) if measure else None,
    )


def _plan(change: str, run: RunConfig, names: Collection[str], schema: Schema) -> ClientPlanForecast:
    assert isinstance(run.privacy, ClientPrivacy), "as above"
    plan = client_plan(run, names, schema)
    releases = most_releases(run, Ledger(plan=plan), names, 1)
    sent = sum(prod(shape) for shape in upload_schema(run, schema, 1).values())
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
        bytes_each_way=BYTES_PER_VALUE * sent,
    )


def _others(run: RunConfig, names: Collection[str], schema: Schema) -> Iterator[ClientPlanForecast]:
    """Yield the plan with one setting halved or doubled, where the run could have it so."""
    cohort = min(run.federation.sites_per_round or len(names), len(names))
    choices: list[tuple[str, RunConfig, Schema | None]] = [
        ("half the rank", run, of_rank(schema, lambda rank: rank // 2 if rank % 2 == 0 else None)),
        ("twice the rank", run, of_rank(schema, lambda rank: 2 * rank)),
    ]
    for what, field, number, most in (
        ("rounds", "rounds", run.federation.rounds, None),
        ("sites in a round", "sites_per_round", cohort, len(names)),
    ):
        for how, changed in (("half", number // 2 if number % 2 == 0 else 0), ("twice", 2 * number)):
            if 0 < changed <= (most or changed):
                federation = run.federation.model_copy(update={field: changed})
                other = run.model_copy(update={"federation": federation})
                choices.append((f"{how} the {what}", other, schema))
    for change, other, shapes in choices:
        if shapes is None:
            continue
        try:
            yield _plan(change, other, names, shapes)
        except ConfigError:  # such as a cohort too small for adaptive clipping: not to be had, so not shown
            continue


def _seconds_of_all(run: RunConfig, rows: Mapping[str, Sequence[Row]], model: LoadedModel) -> float:
    """Return the time of one round of training at every site, by steps at the largest [s]."""
    training = run.training
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    largest = max(rows, key=lambda site: len(rows[site]))
    second = seconds_a_step(run, model, AdapterStack.install(model), largest, rows[largest])
    return second * sum(steps_a_round(training, len(each), batch) for each in rows.values())
