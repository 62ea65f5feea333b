"""Trackers that a run file can name; anything else that takes an event is a tracker too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quorate.server.rounds.evaluation import scalars
from quorate.server.tracking.events import Event, Finished, RoundDone, Started, Tracker
from quorate.server.tracking.records import Evaluation, RoundMetrics, RoundRecord, Summary
from quorate.shared.config.read import dump_yaml
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ConfigError

TENSORBOARD_DIR = "tensorboard"


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

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            self._open(event)
        elif self._writer is None:  # opening it failed, and that was said
            return
        elif isinstance(event, RoundDone):
            self._plot(event.record, event.metrics)
        elif isinstance(event, Finished):
            self._close(event.summary)

    def _open(self, event: Started) -> None:
        """Open the log. Points of rounds after the last finished one, which will be run again, are purged."""
        run, last = event.run, event.resumed_from
        self._hidden = run.hides_participation
        purge = last + 1 if last else None
        self._writer = self._make(str(Path(event.output_dir) / TENSORBOARD_DIR), purge_step=purge)
        if not last:
            # TensorBoard renders Markdown; four blanks in front make it code.
            text = "".join(f"    {line}\n" for line in dump_yaml(run).splitlines())
            sites = ", ".join(event.sites)
            self._writer.add_text("run", f"{run.name}, run {event.run_id}, sites: {sites}\n\n{text}")
        self._writer.flush()

    def _plot(self, record: RoundRecord, metrics: RoundMetrics) -> None:
        if self._hidden:  # all but the figures of an evaluation depends on who was drawn
            validation = metrics.validation
            self._write(dict(_evaluation_scalars(validation)) if validation else {}, record.round)
            return
        self._write(dict(_round_scalars(record, metrics)), record.round)

    def _close(self, summary: Summary) -> None:
        """Write the test figures of the best round's model at that round, and close the log."""
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
