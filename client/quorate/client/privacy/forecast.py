"""What a run with record- or group-level privacy will cost a site, before any of it is spent."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from quorate.client.data.placement import Placement
from quorate.client.data.quality_report import own_source
from quorate.client.data.split_key import look_beside
from quorate.client.data.splits import image_columns, load_splits, measured_apart
from quorate.client.models.base_models import at_site
from quorate.client.policy.site_config import SiteConfig
from quorate.client.privacy.forecast_budgets import BudgetForecast, against_ledger
from quorate.client.privacy.units import check_some, groups_of
from quorate.client.site.loaded import training_device
from quorate.client.trainer.dp.dp_sgd import units_of
from quorate.client.trainer.dp.plan import steps_a_round
from quorate.client.trainer.fit import SiteTask, fit
from quorate.client.trainer.stack import AdapterStack
from quorate.shared.adapters.adapter import Adapter, num_values
from quorate.shared.adapters.selection import downloaded, moving, upload_schema
from quorate.shared.aggregation import GlobalState
from quorate.shared.config.config_model import ConfigModel, UnboundedModel
from quorate.shared.config.privacy_config import SitePrivacy
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ConfigError
from quorate.shared.model.lora_model import LoadedModel, adapter_schema, load_model
from quorate.shared.privacy.run_cost import BYTES_PER_VALUE, Forecast, forecast
from quorate.shared.progress import StepEvent
from quorate.shared.tasks.task import Row

Schema = Mapping[str, tuple[int, ...]]
"""Array's name -> shape."""
WARM, TIMED = 1, 4
"""Steps that are taken to measure: the first ones, which set things up, and those that are timed. A step's
batch is drawn by coins, so single steps differ."""


class SiteForecast(ConfigModel):
    """One site's part of the run."""

    site: str
    unit: Literal["record", "group"]
    """What one difference between neighbouring data sets is."""
    rows: int
    clipping_norm: float
    """L2 norm to which a unit's gradient is clipped."""
    privacy: Forecast
    """Epsilon, noise and steps, as configured and with other settings."""
    bytes_up: int
    """Adapter bytes that it sends in all rounds, without headers."""
    bytes_down: int
    """Adapter bytes that it receives in all rounds, for training and for validation, without headers, the
    residual factors of `fedex`, the test and the delivery of the result."""
    minutes: float | None = None
    """Estimate of its training in all rounds on this machine, by itself; without evaluation and transfers."""
    ledger: str | None = None
    """Path of the ledger that was counted in."""
    budgets: tuple[BudgetForecast, ...] = ()
    """What the spending of a real site's data would come to, by budget."""
    refusal: str | None = None
    """Why the site's budgets would refuse the run, where they would."""
    refused: tuple[str, ...] = ()
    """The other settings with which they would refuse it."""


class RunForecast(UnboundedModel):
    """What `quorate forecast` prints."""

    run: str
    largest_epsilon: float
    """Of the site that spends most; infinite where the noise is too little for any, which a run refuses."""
    device: str | None = None
    """Where steps were measured."""
    peak_memory_bytes: int | None = None
    """The most memory that this process held until the last step (on CUDA: that was allocated there)."""
    sites: tuple[SiteForecast, ...]


def site_privacy(run: RunConfig) -> SitePrivacy:
    """Return the run's record- or group-level privacy.

    Raises: ConfigError: it has none, with what to do.
    """
    if run.privacy is None:
        raise ConfigError(
            "privacy: the run has no such section, so no noise is added and there is nothing to forecast; "
            "give it one, such as `privacy={unit: record, target_epsilon: 8}` on the command line."
        )
    if not isinstance(run.privacy, SitePrivacy):
        raise ConfigError(
            "privacy.unit client: its noise is added by the coordinator and depends on how many sites join, "
            "so one site cannot forecast it; the coordinator can, by a sites file (without --site-file)."
        )
    return run.privacy


def forecast_sites(
    run: RunConfig,
    rows: Mapping[str, Sequence[Row]],
    *,
    measure: bool = True,
    device: torch.device | None = None,
) -> RunForecast:
    """Forecast a run for sites whose training rows are at hand.

    To measure time and memory the base model is loaded, and a few private steps of each site are taken and
    thrown away; else its weights are left alone.

    Args:
        rows: site -> training rows.
        measure: whether to take these steps.
        device: where to; the first visible GPU, else the CPU, when left out.
    Raises: ConfigError: as `site_privacy` and `forecast`. DataError: a site without training rows or groups,
        or with a row the task cannot use. ModelError: the base does not load, or does not tell rows apart.
    """
    privacy = site_privacy(run)
    units = {site: _units(run, site, each) for site, each in rows.items()}
    model = load_model(run, device=device) if measure else None
    schema = model.initial.schema if model else adapter_schema(run)
    plans = {site: _plans(run, site, privacy, each, schema) for site, each in units.items()}
    minutes: dict[str, float] = {}
    if model:
        stack = AdapterStack.install(model)
        for site, each in rows.items():
            plan = plans[site].configured
            settled = {"target_epsilon": None, "noise_multiplier": plan.noise_multiplier}
            private = run.model_copy(update={"privacy": privacy.model_copy(update=settled)})
            minutes[site] = plan.steps * seconds_a_step(private, stack, site, each) / 60
    up, down = traffic(run, schema)
    return RunForecast(
        run=run.name,
        largest_epsilon=max(each.configured.epsilon_pld for each in plans.values()),
        device=str(model.peft.device) if model else None,
        peak_memory_bytes=peak_memory(model) if model else None,
        sites=tuple(
            SiteForecast(
                site=site,
                unit=privacy.unit,
                rows=len(rows[site]),
                clipping_norm=privacy.max_grad_norm,
                privacy=each,
                bytes_up=up,
                bytes_down=down,
                minutes=minutes.get(site),
            )
            for site, each in plans.items()
        ),
    )


def forecast_own(site: SiteConfig, base_dir: Path, run: RunConfig, *, measure: bool = True) -> RunForecast:
    """Forecast a run for the one site whose site.yaml is given.

    Args:
        site: content of site.yaml. Its own copy of the base model is used where the run file names the hash.
        measure: as for `forecast_sites`.
    Raises: as `forecast_sites`; ConfigError: site.yaml does not know the alias; ModelError: it lists no such
        model; LedgerError: the ledger beside it is not what was written.
    """
    site_privacy(run)  # before anything is read
    source = own_source(site, run)
    labels: tuple[str, ...] = getattr(run.task, "labels", ())
    held = look_beside(base_dir)
    placing = Placement.of_seed(source.split.seed) if held is None else held.placing
    images = image_columns(source, run.task.columns)
    splits = load_splits(source, base_dir, run.task.columns, labels, placing)
    if held is not None:
        splits, _ = held.leave_out_trained(splits, images)
    rows = measured_apart(splits, placing, images, by_group=False)[0]["train"]
    training = [Row(row.values, row.source, group=row.group) for row in rows]
    here = at_site(run, site, base_dir) if run.model.sha256 is not None else run
    device = training_device(site.device)
    found = forecast_sites(here, {"this site": training}, measure=measure, device=device)
    (own,) = found.sites
    own = own.model_copy(update=vars(against_ledger(run, site, base_dir, own.privacy)))
    return found.model_copy(update={"sites": (own,)})


def _units(run: RunConfig, site: str, rows: Sequence[Row]) -> int:
    check_some(site, rows)
    return len(units_of(len(rows), groups_of(run, site, rows)))


def _plans(run: RunConfig, site: str, privacy: SitePrivacy, units: int, schema: Schema) -> Forecast:
    training = run.training
    asked = training.per_device_train_batch_size * training.gradient_accumulation_steps
    moved = moving(run, schema, 1)
    try:
        return forecast(
            privacy,
            units=units,
            batch=min(asked, units),  # a site with fewer units takes all of them in every step
            steps_a_round=lambda batch: steps_a_round(training, units, batch),
            rounds=run.federation.rounds,
            shapes={name: shape for name, shape in schema.items() if name in moved},
        )
    except ConfigError as error:
        raise ConfigError(f"site {site}: {error}", kind=error.kind) from error


def traffic(run: RunConfig, schema: Schema, share: float = 1.0) -> tuple[int, int]:
    """Return the adapter bytes that a site is expected to send and to receive in all rounds.

    Args:
        schema: name -> shape of the adapter's arrays.
        share: its chance of being asked to train in a round; it is asked to measure whether it was or not.
    """
    up = down = 0.0
    start = GlobalState(Adapter({name: np.zeros(shape, np.float32) for name, shape in schema.items()}))
    for number in range(1, run.federation.rounds + 1):
        values = num_values(upload_schema(run, schema, number))
        up += share * BYTES_PER_VALUE * values
        down += (share + run.measures_after(number)) * downloaded(run, start, number).num_bytes
    return round(up), round(down)


def seconds_a_step(run: RunConfig, stack: AdapterStack, site: str, rows: Sequence[Row]) -> float:
    """Return the mean time of a warm step on the site's rows [s]."""
    short = run.model_copy(
        update={
            "training": run.training.model_copy(update={"max_steps": WARM + TIMED}),
            "federation": run.federation.model_copy(update={"rounds": 1}),
        }
    )
    task = run.task
    examples = task.weigh(task.pack(task.encode(rows, stack.model.processor)))
    stack.model.check_tokens(examples)
    ended: list[float] = []

    def note(event: StepEvent) -> None:
        if not event.taken:
            return
        if stack.model.peft.device.type == "cuda":
            torch.cuda.synchronize(stack.model.peft.device)
        ended.append(time.perf_counter())

    part = SiteTask(site, examples, stack.model.initial, groups_of(run, site, rows))
    fit(stack, short, 1, [part], moving(run, stack.model.initial, 1), note)
    return (ended[-1] - ended[WARM - 1]) / TIMED


def peak_memory(model: LoadedModel) -> int:
    """Return the most memory held so far [bytes]: of the GPU that is trained on, else of this process."""
    if model.peft.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.peft.device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most  # Linux counts in KiB
