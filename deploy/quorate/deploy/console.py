"""Progress of a run for people: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from quorate.server.rounds.evaluation import scalars
from quorate.server.tracking.events import (
    Event,
    Finished,
    HeadSolved,
    PhaseBegan,
    Refused,
    RoundDone,
    Started,
    Waiting,
)
from quorate.server.tracking.records import RoundMetrics, RoundRecord, SolvedHead, Summary
from quorate.shared.progress import StepEvent

_BRIEF = ("cohort", "aggregate", "checkpoint")
"""Phases that are over at once: a line for each would only hide the others."""


class ConsoleTracker:
    """A tracker that tells a person how far the run is.

    Args:
        console: where to write, stderr as a rule.
        quiet: write nothing; the summary is kept all the same.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.summary: Summary | None = None
        self._console = console
        self._quiet = quiet
        self._rounds = 0
        self._first = 1
        self._since = time.monotonic()
        self._where = ""
        self._next_line = 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __call__(self, event: Event) -> None:
        """Show one event. Log messages are not shown: those of this process are on its terminal already."""
        match event:
            case Refused():
                for site, why in event.sites.items():
                    self._line(f"cannot take part: {site}: {why.reason}")
            case Started():
                self._start(event)
            case PhaseBegan():
                self._phase(event.round, event.name)
            case Waiting():
                self._waiting(event.sites)
            case HeadSolved():
                self._head(event.head)
            case RoundDone():
                self._round(event.record, event.metrics)
            case Finished():
                self.summary = event.summary  # for whoever prints it

    def _start(self, event: Started) -> None:
        sites, last = event.sites, event.resumed_from
        self._rounds, self._first = event.run.federation.rounds, last + 1
        self._since = time.monotonic()
        again = f", going on after round {last}" if last else ""
        names = ", ".join(
            f"{name} ({sum(description.rows.values())} rows)" for name, description in sites.items()
        )
        self._line(
            f"{event.run.name}: {self._rounds} rounds over {len(sites)} sites{again}, into {event.output_dir}"
        )
        self._line(f"sites: {names}")
        for name, description in sites.items():
            for note in description.notes:
                self._line(f"note: {name}: {note}")
        if self._console.is_terminal and not self._quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[detail]}"),
                console=self._console,
                transient=True,
                refresh_per_second=2,  # steps take longer than this, and drawing takes time from them
            )
            self._task = self._bar.add_task("", total=self._rounds, completed=last, detail="")
            self._bar.start()

    def _phase(self, round: int, name: str) -> None:
        # A round after the last is none: the reference runs have rounds of their own.
        at = f"round {round}/{self._rounds} · " if 0 < round <= self._rounds else ""
        self._where, self._next_line = f"{at}{name}", 0.0
        if self._bar is None:
            if name not in _BRIEF:
                self._line(self._where)
        else:
            self._show("")

    def _waiting(self, sites: Mapping[str, float]) -> None:
        """Say who is being waited for, and since when; where there are lines, less and less often."""
        longest = max(sites.values(), default=0.0)
        names = ", ".join(list(sites)[:3]) + (f" +{len(sites) - 3}" if len(sites) > 3 else "")
        said = f"waiting for {names} since {longest:.0f} s"
        if self._bar is not None:
            self._show(said)
        elif longest >= self._next_line:
            self._line(f"{self._where} · {said}")
            self._next_line = 2 * longest

    def step(self, event: StepEvent) -> None:
        """Show an optimiser step; on a terminal alone, as there are too many for lines."""
        if self._bar is None or not event.taken:
            return
        names = ", ".join(event.sites[:3]) + (f" +{len(event.sites) - 3}" if len(event.sites) > 3 else "")
        loss = "" if event.loss is None else f" · loss {event.loss:.3f}"
        self._show(f"{names} · step {event.step}/{event.steps}{loss}{self._left()}")

    def _head(self, head: SolvedHead) -> None:
        """Write a line on the head that round 1 begins from, and who is not in it."""
        picked = f"picked on {head.validation_rows} validation rows" if head.validation_rows else "by default"
        size = sum(head.bytes_up.values()) / 1e6
        self._line(
            f"head solved from sums of {len(head.rows)} sites ({sum(head.rows.values())} rows) · ridge "
            f"{head.strength:g} {picked} · {size:.1f} MB came · {head.seconds:.1f} s"
        )
        for site, why in head.excluded.items():
            self._line(f"  not in it: {site}: {why.reason}")

    def _round(self, record: RoundRecord, metrics: RoundMetrics) -> None:
        """Write the round's line: pooled metrics, training loss, who counted, seconds."""
        parts = [f"round {record.round}/{self._rounds}"]
        if metrics.validation:
            parts += [f"{name} {value:.3f}" for name, value in scalars(metrics.validation.pooled).items()]
        losses = [figures["train_loss"] for figures in metrics.train.values() if "train_loss" in figures]
        if losses:
            parts.append(f"train loss {sum(losses) / len(losses):.3f}")
        parts.append(f"{len(record.weights)} of {len(record.cohort)} sites")
        parts.append(f"{sum(record.seconds.values()):.1f} s")
        self._line(" · ".join(parts))
        for site, why in record.excluded.items():
            self._line(f"  set aside: {site}: {why.reason}")
        if record.early_stop:
            self._line(record.early_stop)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=record.round)

    def close(self) -> None:
        """Take the live bar off the screen. Safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _left(self) -> str:
        """Return the seconds left to the last round, from the mean of this session's rounds."""
        done = 0 if self._bar is None else int(self._bar.tasks[0].completed) - self._first + 1
        if not done:
            return ""
        remaining = self._rounds - self._first + 1 - done
        elapsed = time.monotonic() - self._since
        per_round = elapsed / (done + 0.5)  # in the middle of a round, on average
        return f" · about {max(per_round * (remaining - 0.5), 1):.0f} s left"

    def _show(self, detail: str) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=escape(self._where), detail=escape(detail))

    def _line(self, text: str) -> None:
        if not self._quiet:
            # Long lines stay one line where nobody scrolls: a log is searched by line.
            text = "".join(c if c.isprintable() else " " for c in text)  # a site's words may steer a terminal
            self._console.print(text, markup=False, soft_wrap=not self._console.is_terminal)
            self._console.file.flush()
