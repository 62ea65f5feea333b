"""Client-level differential privacy of a run: what is planned before round 1, done in each, claimed after."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from quorate.server.exchange.join import Members
from quorate.server.privacy.central_plan import client_plan, most_releases, private_cohort, useless
from quorate.server.privacy.clipped_sum import ClippedSum, next_norm
from quorate.server.privacy.released import (
    ClientPlan,
    Pending,
    Released,
    ReleaseLedger,
    drop_released,
    missing_ledger,
    read_released,
    write_released,
)
from quorate.server.rounds.checkpoint import Progress
from quorate.server.rounds.round_log import RoundLog
from quorate.server.rounds.run import Run
from quorate.server.tracking.records import ClientClaim, RoundNoise
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.adapters.selection import upload_schema
from quorate.shared.aggregation import GlobalState
from quorate.shared.aggregation.rule import Accumulator, RoundNotes
from quorate.shared.config.privacy_config import ClientPrivacy
from quorate.shared.privacy.accounting import epsilon
from quorate.shared.privacy.rounding import at_most, delta_shown
from quorate.shared.privacy.secure_random import secret_source

log = logging.getLogger(__name__)


@dataclass
class NoisedAccumulator(Accumulator):
    """Step 6 of a round: the rule sees the noised mean of clipped updates as the only update there is.

    Args:
        inner: the rule's own.
        noise: what was added; None before `finish`.
    """

    inner: Accumulator
    clipped: ClippedSum
    plan: ClientPlan
    privacy: ClientPrivacy
    noise: RoundNoise | None = None

    def add(self, site: str, update: Adapter, weight: float) -> None:
        """Clip the update and add it up; all weigh the same."""
        self.clipped.add(update)

    def finish(self) -> tuple[GlobalState, RoundNotes]:
        """Add the noise, and have the rule go on from there."""
        plan, norm = self.plan, self.clipped.clipping_norm
        source = secret_source(self.privacy.secure_rng)
        mean = self.clipped.noised_mean(plan.sum_multiplier, plan.expected_cohort, source)
        fraction, following = None, norm
        if self.privacy.adaptive_quantile is not None and plan.count_deviation is not None:
            fraction = self.clipped.noised_fraction(plan.count_deviation, plan.expected_cohort, source)
            following = next_norm(norm, fraction, self.privacy.adaptive_quantile)
        self.noise = RoundNoise(
            clipping_norm=norm,
            deviation=plan.sum_multiplier * norm,
            fraction_within=fraction,
            next_norm=following,
        )
        self.inner.add("", mean, 1.0)
        return self.inner.finish()


@dataclass
class CentralPrivacy:
    """What `privacy: {unit: client}` adds to a run.

    Args:
        ledger: what has been released, and how.
        planned_epsilon: what will have been spent after the last round.
        pending: the round to go on with, where a killed process had released it already.
    """

    run: Run
    privacy: ClientPrivacy
    ledger: ReleaseLedger
    planned_epsilon: float
    pending: Pending | None = None

    @classmethod
    def open(
        cls, run: Run, members: Members, state: GlobalState, progress: Progress | None
    ) -> CentralPrivacy | None:
        """Settle the noise before round 1, or go on as it was settled; None without client-level privacy.

        Raises: ConfigError: delta is too large, or the noise asked for cannot be had. CheckpointError: what
            was released before cannot be read.
        """
        privacy = run.config.privacy
        if not isinstance(privacy, ClientPrivacy):
            return None
        done = progress.round if progress else 0
        ledger = ReleaseLedger.read(run.output_dir)
        if ledger is None and done:
            raise missing_ledger(run.output_dir)
        if ledger is None:
            ledger = ReleaseLedger(plan=client_plan(run.config, members.nodes, members.initial.schema))
            ledger.write(run.output_dir)
        pending = read_released(run.output_dir, done + 1, state.stored().content_hash)
        drop_released(run.output_dir, done + 1 if pending else None)
        if pending:
            ledger = ledger.after(pending.released)
            ledger.write(run.output_dir)
        first = done + (2 if pending else 1)
        planned = ledger.plan.events(most_releases(run.config, ledger, members.nodes, first))
        central = cls(run, privacy, ledger, epsilon(planned, privacy.delta), pending)
        central._tell()
        return central

    def cohort(self, members: Members, round: int) -> tuple[str, ...]:
        """Draw the sites that are asked in `round`: each by its own coin, secret where that is to count."""
        return private_cohort(self.run.config, self.ledger.plan, members.nodes, round)

    def noised(
        self, inner: Accumulator, state: GlobalState, before: Progress | None, round: int
    ) -> NoisedAccumulator:
        """Put clipping and noise before a rule's accumulator, with the norm that the round before left."""
        names = upload_schema(self.run.config, state.adapter.schema, round)
        noise = before.record.noise if before else None
        norm = noise.next_norm if noise else self.privacy.clipping_norm
        return NoisedAccumulator(
            inner, ClippedSum(state.adapter, names, norm), self.ledger.plan, self.privacy
        )

    def release(self, before: GlobalState, after: GlobalState, log: RoundLog) -> None:
        """Put the round's model on disk and its cost into the ledger, before any site sees it."""
        released = Released(
            round=log.round,
            started_from=before.stored().content_hash,
            state_hash=after.stored().content_hash,
            cohort=log.cohort,
            log=log,
        )
        write_released(self.run.output_dir, released, after)
        self._count(released)

    def take_pending(self, round: int) -> Pending | None:
        """Return the round that a killed process released, once."""
        pending, self.pending = self.pending, None
        return pending if pending and pending.released.round == round else None

    def finished(self) -> None:
        """Drop what was kept for a kill: the round has its checkpoint."""
        drop_released(self.run.output_dir)

    def claim(self, norm: float | None) -> ClientClaim:
        """Return what has been spent so far; `norm` is the last round's clipping norm."""
        plan, delta = self.ledger.plan, self.privacy.delta
        return ClientClaim(
            epsilon=epsilon(self.ledger.events, delta),
            planned_epsilon=self.planned_epsilon,
            delta=delta,
            sites=plan.sites,
            sampling_probability=plan.sampling_probability,
            expected_cohort=plan.expected_cohort,
            participation_hidden=plan.participation_hidden,
            noise_multiplier=plan.noise_multiplier,
            sum_multiplier=plan.sum_multiplier,
            values=plan.values,
            noise_on_mean=plan.noise_on_mean,
            clipping_norm=norm,
            releases=self.ledger.releases,
            events=self.ledger.events,
        )

    def _count(self, released: Released) -> None:
        self.ledger = self.ledger.after(released)
        self.ledger.write(self.run.output_dir)

    def _tell(self) -> None:
        """Say what the run will have cost, and loudly if it buys nothing."""
        plan, target = self.ledger.plan, self.privacy.target_epsilon
        log.info(
            "site-level privacy: epsilon %s at delta %s after %d rounds, noise multiplier %.4g, "
            "noise on the mean update %.3g times the clipping norm",
            at_most(self.planned_epsilon),
            delta_shown(self.privacy.delta),
            self.run.config.federation.rounds,
            plan.noise_multiplier,
            plan.noise_on_mean,
        )
        if (warning := useless(plan)) is not None:
            log.warning(warning)
        # Calibration ends just below the target; a hair above is its tolerance.
        if target is not None and self.planned_epsilon > target * 1.001:
            log.warning(
                "privacy.target_epsilon: rounds were released again or other sites joined since the run "
                "began, so it will have spent epsilon %s instead of %g; start again in another folder to "
                "keep to the target (what was released stays released)",
                at_most(self.planned_epsilon),
                target,
            )
