"""The log of one round: who was asked, who counted, and what it took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from quorate.server.exchange.exchange import Answers
from quorate.server.exchange.exclusions import exclusion
from quorate.server.rounds.run import Run
from quorate.server.rounds.screening import Passed
from quorate.server.tracking.events import PhaseBegan
from quorate.server.tracking.records import Exclusion, RoundNoise, RoundRecord, SolvedHead


@dataclass
class RoundLog:
    """What a round notes down while it runs.

    Args:
        round: its number, from 1.
        cohort: the sites that were asked to train.
    """

    round: int
    cohort: tuple[str, ...] = ()
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
    def timed(self, run: Run, phase: str) -> Iterator[None]:
        """Time one step of the round and tell the trackers that it began."""
        run.tell(PhaseBegan(round=self.round, name=phase))
        started = time.monotonic()
        yield
        self.add_seconds(phase, time.monotonic() - started)

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Add to what a step took, to the millisecond: more digits are noise."""
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + seconds, 3)

    def take(self, answers: Answers) -> None:
        for total, part in ((self.bytes_down, answers.bytes_down), (self.bytes_up, answers.bytes_up)):
            for site, count in part.items():
                total[site] = total.get(site, 0) + count
        # Why a site's training did not count says more than why it was not measured after that.
        self.excluded = {**answers.excluded, **self.excluded}

    def note(self, passed: Passed) -> None:
        header = passed.header
        self.num_examples[passed.site] = header.num_examples
        self.num_steps[passed.site] = header.num_steps
        self.train[passed.site] = header.metrics
        self.norms[passed.site] = passed.norm
        self.weights[passed.site] = passed.weight

    def leave_out(self, excluded: Mapping[str, str]) -> None:
        """Note sites whose updates came and do not count, by the word of the rule."""
        for site, why in excluded.items():
            self.excluded[site] = exclusion("rule", why)
            for figures in (self.num_examples, self.num_steps, self.train, self.norms, self.weights):
                figures.pop(site, None)

    def record(self, state_hash: str, early_stop: str | None, head: SolvedHead | None = None) -> RoundRecord:
        total = sum(self.weights.values())
        return RoundRecord(
            round=self.round,
            cohort=self.cohort,
            weights={site: weight / total for site, weight in self.weights.items()},
            num_examples=self.num_examples,
            num_steps=self.num_steps,
            update_norms=self.norms,
            excluded=self.excluded,
            bytes_down=self.bytes_down,
            bytes_up=self.bytes_up,
            seconds=self.seconds,
            state_hash=state_hash,
            early_stop=early_stop,
            head=head,
            noise=self.noise,
        )
