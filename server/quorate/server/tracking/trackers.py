"""Trackers: whoever wants to follow a run while it runs. The run's own files are written without them.

The round loop calls a tracker's methods; one that raises is logged there and the run goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from quorate.server.rounds.evaluation import scalars
from quorate.server.tracking.records import Evaluation, Exclusion, RoundMetrics, RoundRecord, Summary
from quorate.shared.config.read import dump_yaml
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ConfigError
from quorate.shared.protocol.messages import SiteDescription

TENSORBOARD_DIR = "tensorboard"


@runtime_checkable
class Tracker(Protocol):
    """What the round loop tells. Calls come in this order: start, then per round phases and round, finish.

    `refused` comes before `start`, only where there are such sites. `phase` and `waiting` also come before
    `start` (sites join, round 0) and after the last round (test, outputs).
    """

    def refused(self, sites: Mapping[str, Exclusion]) -> None:
        """Take note of sites that cannot take part, and why."""

    def start(
        self,
        run: RunConfig,
        run_id: str,
        output_dir: Path,
        sites: Mapping[str, SiteDescription],
        resumed_from: int,
    ) -> None:
        """Begin, or go on after round `resumed_from` (0 for a new run)."""

    def phase(self, round: int, name: str) -> None:
        """Take note that a step of `round` begins."""

    def waiting(self, sites: Mapping[str, float]) -> None:
        """Take note of who is being waited for: site -> seconds since it was asked. Told now and then."""

    def round(self, record: RoundRecord, metrics: RoundMetrics) -> None:
        """Take note of a finished round, which is on disk already."""

    def finish(self, summary: Summary) -> None:
        """Take note of the end; also called for a run that was interrupted."""


def configured_trackers(run: RunConfig) -> list[Tracker]:
    """Return the trackers that `report_to` names.

    Raises: ConfigError: the package of one is not installed.
    """
    kinds = {"tensorboard": TensorboardTracker}
    return [kinds[name]() for name in run.report_to]


class TensorboardTracker:
    """Scalars for TensorBoard in `output_dir/tensorboard`; the step is the round.

    Raises: ConfigError: the package tensorboard is not installed; known before anything is trained.
    """

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "report_to: tensorboard needs a package that is not installed; "
                "run `pip install 'quorate[tensorboard]'`, or take tensorboard out of report_to."
            ) from error
        self._make = SummaryWriter
        self._hidden = False
        self._writer: Any = None

    def refused(self, sites: Mapping[str, Exclusion]) -> None:
        """There is nothing to plot of them."""

    def start(
        self,
        run: RunConfig,
        run_id: str,
        output_dir: Path,
        sites: Mapping[str, SiteDescription],
        resumed_from: int,
    ) -> None:
        """Open the log. Points of rounds after `resumed_from`, which will be run again, are purged."""
        self._hidden = run.hides_participation
        purge = resumed_from + 1 if resumed_from else None
        self._writer = self._make(str(output_dir / TENSORBOARD_DIR), purge_step=purge)
        if not resumed_from:
            # TensorBoard renders Markdown; four blanks in front make it code.
            text = "".join(f"    {line}\n" for line in dump_yaml(run).splitlines())
            self._writer.add_text("run", f"{run.name}, run {run_id}, sites: {', '.join(sites)}\n\n{text}")
        self._writer.flush()

    def phase(self, round: int, name: str) -> None:
        """Phases are in the record's seconds; there is nothing to plot yet."""

    def waiting(self, sites: Mapping[str, float]) -> None:
        """There is nothing to plot of it."""

    def round(self, record: RoundRecord, metrics: RoundMetrics) -> None:
        """Write the round's scalars and flush, so that a run that is killed later has them."""
        if self._writer is None:  # `start` failed, and that was said
            return
        if self._hidden:  # all but the figures of an evaluation depends on who was drawn
            validation = metrics.validation
            self._write(dict(_evaluation_scalars(validation)) if validation else {}, record.round)
            return
        self._write(dict(_round_scalars(record, metrics)), record.round)

    def finish(self, summary: Summary) -> None:
        """Write the test figures of the best round's model at that round, and close the log."""
        if self._writer is None:
            return
        if summary.best and summary.best.test:
            self._write(dict(_evaluation_scalars(summary.best.test)), summary.best.round)
        self._writer.close()
        self._writer = None

    def _write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


def _round_scalars(record: RoundRecord, metrics: RoundMetrics) -> Iterator[tuple[str, float]]:
    for site, figures in metrics.train.items():
        yield from ((f"train/{site}/{name}", value) for name, value in figures.items())
    if metrics.validation:
        yield from _evaluation_scalars(metrics.validation)
    yield "traffic/bytes_up", sum(record.bytes_up.values())
    yield "traffic/bytes_down", sum(record.bytes_down.values())
    yield from ((f"seconds/{name}", value) for name, value in record.seconds.items())
    yield "sites/counted", len(record.weights)
    yield "sites/set_aside", len(record.excluded)
    for site, norm in record.update_norms.items():
        yield f"update_norm/{site}", norm


def _evaluation_scalars(evaluation: Evaluation) -> Iterator[tuple[str, float]]:
    split = evaluation.split
    yield from ((f"{split}/pooled/{name}", value) for name, value in scalars(evaluation.pooled).items())
    yield from ((f"{split}/mean/{name}", value) for name, value in evaluation.mean.items())
    for site, figures in evaluation.sites.items():
        yield from ((f"{split}/sites/{site}/{name}", value) for name, value in scalars(figures).items())
