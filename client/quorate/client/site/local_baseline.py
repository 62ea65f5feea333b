"""The local-only reference at a site: its own adapter, trained on its rows alone.

The site does all of it in one go and answers with what that adapter gets right on its test rows. The adapter
itself never leaves the site. A kill in the middle repeats it from its start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quorate.client.site.loaded import Resident
from quorate.client.trainer.evaluate import evaluate
from quorate.client.trainer.fit import SiteTask, fit
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.adapters.selection import moving
from quorate.shared.aggregation import FedAvg
from quorate.shared.config.privacy_config import SitePrivacy
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import NonFiniteUpdate
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.progress import OnStep
from quorate.shared.tasks.task import Example

UNKNOWN = float("-inf")
"""The value of an adapter where there are no validation rows."""


@dataclass(frozen=True)
class LocalBaseline:
    """What a site's own adapter is worth on the site's test rows.

    Args:
        round: the best one on its validation rows, or the last where it has none.
        outcomes: on test rows.
    """

    round: int
    outcomes: Outcomes


def single(config: RunConfig) -> RunConfig:
    """Return the configuration for a site alone: with one site every rule reduces to training all factors.

    Not so under privacy at the site, where ffa is a choice of what gets noise: a site alone would make the
    same one. Noise of the server has nothing to hide where there is one site.
    """
    if isinstance(config.privacy, SitePrivacy) and config.aggregation.name == "ffa":
        return config
    privacy = None if config.private_clients else config.privacy
    return config.model_copy(update={"aggregation": FedAvg(), "privacy": privacy})


def value(config: RunConfig, outcomes: Outcomes | None) -> float:
    """Return the run's metric, with a sign so that more is better; UNKNOWN without validation rows."""
    if outcomes is None or not outcomes.rows:
        return UNKNOWN
    return config.task.sign(config.metric) * float(config.task.metrics(outcomes)[config.metric])


def train_local_baseline(
    resident: Resident,
    task: SiteTask,
    validation: Sequence[Example],
    test: Sequence[Example],
    on_step: OnStep,
) -> LocalBaseline:
    """Train as many rounds of as many steps as in the federation, and measure the best of them.

    Args:
        resident: the run, the base without a residual, and the adapters on it.
        task: the site's training rows and the seeded start.
        validation: its validation rows, which pick the round.
    Raises: NonFiniteUpdate: training diverged.
    """
    config, stack = resident.run, resident.stack
    run, last = single(config), config.federation.rounds
    current = task.start
    best: tuple[int, Adapter, float] | None = None
    for round in range(1, last + 1):
        moved = moving(run, stack.model.initial, round)
        start = SiteTask(task.site, task.examples, current)
        (fitted,) = fit(stack, run, round, [start], moved, on_step)
        current = fitted.adapter
        try:
            current.check_finite()
        except NonFiniteUpdate as error:
            raise NonFiniteUpdate("training alone diverged; lower training.learning_rate.") from error
        if round % config.evaluation.every and round != last:
            continue
        scored = value(run, evaluate(stack, run, current, validation) if validation else None)
        if best is None or scored > best[2] or scored == UNKNOWN:
            best = round, current, scored
    assert best is not None, "the last round is always measured"
    return LocalBaseline(best[0], evaluate(stack, run, best[1], test) if test else Outcomes())
