"""The books of one round: who was asked for what, who counted, and what it took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from quorate.server.exchange.exchange import Answers
from quorate.server.rounds.run import Run
from quorate.server.tracking.events import PhaseBegan
from quorate.server.tracking.records import Exclusion, RoundNoise, RoundRecord
from quorate.shared.protocol.messages import Update


@dataclass
class Books:
    """What a round notes down while it runs."""

    seconds: dict[str, float] = field(default_factory=dict)
    bytes_down: dict[str, int] = field(default_factory=dict)
    bytes_up: dict[str, int] = field(default_factory=dict)
    excluded: dict[str, Exclusion] = field(default_factory=dict)
    num_examples: dict[str, int] = field(default_factory=dict)
    num_steps: dict[str, int] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    train: dict[str, dict[str, float]] = field(default_factory=dict)
    noise: RoundNoise | None = None

    @contextmanager
    def timed(self, run: Run, round: int, phase: str) -> Iterator[None]:
        """Time one step of the round and tell the trackers that it began."""
        run.tell(PhaseBegan(round=round, name=phase))
        started = time.monotonic()
        yield
        self.seconds[phase] = round_seconds(time.monotonic() - started)

    def take(self, answers: Answers) -> None:
        """Add an exchange's traffic and exclusions."""
        for total, part in ((self.bytes_down, answers.bytes_down), (self.bytes_up, answers.bytes_up)):
            for site, count in part.items():
                total[site] = total.get(site, 0) + count
        # Why a site's training did not count says more than why it was not measured after that.
        self.excluded = {**answers.excluded, **self.excluded}

    def note(self, site: str, update: Update, weight: float) -> None:
        """Note an update that counts."""
        self.num_examples[site] = update.header.num_examples
        self.num_steps[site] = update.header.num_steps
        self.train[site] = update.header.metrics
        self.weights[site] = weight

    def record(
        self, round: int, cohort: tuple[str, ...], state_hash: str, early_stop: str | None
    ) -> RoundRecord:
        """Return the round's record."""
        total = sum(self.weights.values())
        return RoundRecord(
            round=round,
            cohort=cohort,
            weights={site: weight / total for site, weight in self.weights.items()},
            num_examples=self.num_examples,
            num_steps=self.num_steps,
            update_norms={site: self.norms[site] for site in self.weights},
            excluded=self.excluded,
            bytes_down=self.bytes_down,
            bytes_up=self.bytes_up,
            seconds=self.seconds,
            state_hash=state_hash,
            early_stop=early_stop,
            noise=self.noise,
        )


def round_seconds(seconds: float) -> float:
    """Round to milliseconds: more digits are noise."""
    return round(seconds, 3)
