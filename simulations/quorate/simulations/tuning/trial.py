"""One trial of a search: a federation with some settings, followed round by round, and what it is worth."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quorate.client.site.data_source import SiteRows
from quorate.client.site.engine import Engine
from quorate.server.rounds.evaluation import scalars
from quorate.server.rounds.run import Run
from quorate.server.tracking.events import Event, RoundDone, Tracker, telling_warnings
from quorate.shared.config.load import load_run
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ConfigError, ModelDiverged, QuorumNotMet
from quorate.shared.progress import OnStep, ignore_step
from quorate.simulations.in_process_grid import InProcessGrid
from quorate.simulations.provenance import Origin
from quorate.simulations.runner import serve
from quorate.simulations.tuning.space import Choices, FloatRange, IntRange, SpaceConfig, Value, as_overrides

if TYPE_CHECKING:
    from optuna import Trial

log = logging.getLogger(__name__)

TRIALS_DIR = "trials"
DIVERGED, RETRY_OF, BEST_ROUND, SECONDS = "diverged", "retry_of", "best_round", "seconds"
"""Attributes of a trial: why it has no value, the trial it runs again, its best round, its wall time [s]."""


class Pruned(KeyboardInterrupt):
    """Stops a run after the round it is in, as Ctrl-C does: the run alone, and not by an error."""


class Diverged(Exception):
    """A trial that came to no value."""


@dataclass
class Search:
    """One search.

    Args:
        overrides: of the run file, for every trial.
        space: what is searched, checked against the run file.
        rows: site name -> split -> rows.
        output_dir: everything it writes.
        origin: where the rows came from.
        say: told, in a line, of every trial that ended.
    Raises: ConfigError: the run file does not validate, or its privacy does not go with a search.
    """

    run_path: Path
    overrides: Sequence[str]
    space: SpaceConfig
    rows: Mapping[str, SiteRows]
    output_dir: Path
    origin: Origin | None = None
    say: Callable[[str], None] = log.info
    on_step: OnStep = ignore_step
    base: RunConfig = field(init=False)

    def __post_init__(self) -> None:
        self.base = load_run(self.run_path, self.overrides)
        if self.base.private_clients:
            raise ConfigError(
                "privacy.unit client: a search picks settings by the sites' validation rows, to which no "
                "noise is added, and every trial spends epsilon of its own; search without privacy on public "
                "or made-up data (a simulation can), and run the settings found with it."
            )

        if not self.base.evaluation.share_outcomes:
            raise ConfigError(
                "evaluation.share_outcomes: a search compares trials by what they get right on validation "
                "rows; search with share_outcomes: true, on public or made-up data where sites must not "
                "send that."
            )

    @property
    def metric(self) -> str:
        """What is searched for: the metric that picks a run's best round."""
        return self.base.metric

    @property
    def direction(self) -> str:
        """Which way the metric is better."""
        return "maximize" if self.base.task.sign(self.metric) > 0 else "minimize"

    def config(self, values: Mapping[str, Any]) -> RunConfig:
        return load_run(self.run_path, [*self.overrides, *as_overrides(values)])


def trial_dir(output_dir: Path, number: int) -> Path:
    """Return the run folder of a trial."""
    return output_dir / TRIALS_DIR / f"{number:03d}"


def suggest(trial: Trial, key: str, parameter: FloatRange | IntRange | Choices) -> Value:
    """Draw one value."""
    if isinstance(parameter, Choices):
        return trial.suggest_categorical(key, parameter.choices)
    if isinstance(parameter, FloatRange):
        return trial.suggest_float(key, parameter.low, parameter.high, log=parameter.log, step=parameter.step)
    return trial.suggest_int(key, parameter.low, parameter.high, log=parameter.log, step=parameter.step)


def _watch(trial: Trial, metric: str, rounds: int) -> Tracker:
    def report(event: Event) -> None:
        """Report a round's pooled validation metric."""
        if not isinstance(event, RoundDone) or event.metrics.validation is None:
            return
        value = scalars(event.metrics.validation.pooled).get(metric)
        if value is None or not math.isfinite(value):
            return
        trial.report(value, event.record.round)
        if event.record.round < rounds and trial.should_prune():
            raise Pruned

    return report


def objective(trial: Trial, search: Search, engine: Engine) -> float:
    """Run one trial; returns the best round's validation metric."""
    from optuna import TrialPruned

    started = time.monotonic()
    values = {key: suggest(trial, key, each) for key, each in search.space.space.items()}
    config = engine.prepare(search.config(values))
    watch = _watch(trial, search.metric, config.federation.rounds)
    run = Run.open(config, trial_dir(search.output_dir, trial.number), trackers=[watch])
    with telling_warnings(run.output_dir, run.trackers):
        result = serve(InProcessGrid(engine, list(search.rows)), run)
    for folder in run.output_dir.glob("checkpoint-*"):  # the adapters of trials that nobody will use
        shutil.rmtree(folder)
    trial.set_user_attr(SECONDS, round(time.monotonic() - started, 1))
    if result.progress is not None and result.progress.best_round is not None:
        trial.set_user_attr(BEST_ROUND, result.progress.best_round)
    if isinstance(result.stopped, Pruned):
        raise TrialPruned
    if isinstance(result.stopped, (QuorumNotMet, ModelDiverged)):
        trial.set_user_attr(DIVERGED, str(result.stopped))
        raise Diverged
    if result.stopped is not None:
        raise result.stopped
    value = result.progress.best_value if result.progress else None
    if value is None:
        trial.set_user_attr(DIVERGED, f"{search.metric} was not finite in any round")
        raise Diverged
    return value
