"""The main path of Quorate: the rounds of a run, as numbered steps."""

from __future__ import annotations

import time
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Literal

from flwr.serverapp import Grid

from quorate.server.exchange.join import Members, join, warn_of_changes
from quorate.server.exchange.latecomers import Latecomers
from quorate.server.privacy.central_dp import CentralPrivacy, NoisedAccumulator
from quorate.server.rounds.best_round import BestRound
from quorate.server.rounds.checkpoint import Progress, drop_checkpoints, save_checkpoint
from quorate.server.rounds.cohort import choose_cohort
from quorate.server.rounds.measuring import measure
from quorate.server.rounds.round import Round
from quorate.server.rounds.round_log import RoundLog
from quorate.server.rounds.run import Run
from quorate.server.rounds.training import Collection
from quorate.server.rounds.warm_start import warm_start
from quorate.server.tracking.events import PhaseBegan, RoundDone, Started
from quorate.server.tracking.records import ClientClaim, Evaluation, RoundMetrics, SolvedHead
from quorate.shared.aggregation import GlobalState
from quorate.shared.errors import CheckpointError, ConfigError, ModelDiverged, QuorumNotMet


@dataclass
class Result:
    """Where a run ended.

    Args:
        state: after the last finished round.
        progress: of that round; None when no round finished.
        members: the sites and their nodes.
        stopped: what ended it early, to be raised again once the outputs are written.
        central: client-level privacy, where the run asks for it.
    """

    state: GlobalState
    progress: Progress | None
    members: Members
    stopped: KeyboardInterrupt | QuorumNotMet | ModelDiverged | None = None
    central: CentralPrivacy | None = None

    def stop(self, why: KeyboardInterrupt | QuorumNotMet | ModelDiverged) -> None:
        """Take note of what ended the run early; the first reason stands."""
        self.stopped = self.stopped or why

    @property
    def status(self) -> Literal["done", "interrupted", "quorum-not-met", "diverged"]:
        if self.stopped is None:
            return "done"
        if isinstance(self.stopped, ModelDiverged):
            return "diverged"
        return "interrupted" if isinstance(self.stopped, KeyboardInterrupt) else "quorum-not-met"

    @property
    def claim(self) -> ClientClaim | None:
        """What has been spent of client-level privacy, where the run asks for it."""
        noise = self.progress.record.noise if self.progress else None
        return self.central.claim(noise.clipping_norm if noise else None) if self.central else None

    @property
    def early(self) -> str | None:
        """Why the last finished round was to be the last one, though the run asks for more."""
        return self.progress.record.early_stop if self.progress else None


def run_rounds(grid: Grid, run: Run, names: Mapping[int, str] | None = None) -> Result:
    """Run (or resume) all rounds; every finished round is on disk before the next begins.

    Args:
        names: node id -> site, where the server knows them by their keys; sites then answer under no other
            name. None: sites say their names themselves, as in a simulation.
    A head that is solved is so before round 1; a run that ends before its first checkpoint does it again.

    Raises: QuorumNotMet: too few sites could join. BadInput: the run cannot be carried out as asked.
    """
    members = join(grid, run, names)
    _check_stopping(run, members)
    state, progress = _start(run, members)
    central = CentralPrivacy.open(run, members, state, progress)
    run.tell(
        Started(
            run=run.config,
            run_id=run.run_id,
            output_dir=str(run.output_dir),
            sites=members.sites,
            resumed_from=progress.round if progress else 0,
        )
    )
    result = Result(state, progress, members, central=central)
    latecomers = Latecomers(grid, run, members, names)
    first = progress.round + 1 if progress else 1
    head: SolvedHead | None = None
    try:
        if run.config.solves_head and progress is None:
            result.state, head = warm_start(grid, run, members, result.state)
        for round in range(first, run.config.federation.rounds + 1):
            if result.early is not None:
                break
            latecomers.take(round)
            result.state, result.progress = run_round(
                Round(grid, run, members, round, head if round == 1 else None),
                result.state,
                result.progress,
                central,
            )
    except (KeyboardInterrupt, QuorumNotMet, ModelDiverged) as stop:
        result.stop(stop)
        result.state, result.progress = run.reload() or (result.state, result.progress)
    return result


def run_round(
    round: Round, state: GlobalState, before: Progress | None, central: CentralPrivacy | None = None
) -> tuple[GlobalState, Progress]:
    """Run one round from `state`.

    Args:
        round: its number, and whom it can ask.
        central: client-level privacy, where the run asks for it.
    Returns: the state after it, and the progress that was checkpointed.
    Raises: QuorumNotMet: fewer good updates than federation.quorum. ModelDiverged: no site can measure what
        came of them; the round then leaves no checkpoint.
    """
    run, rule, number = round.run, round.run.config.aggregation, round.number
    pending = central.take_pending(number) if central else None
    if pending:  # steps 1 to 7 were done before a kill
        log, after = pending.released.log, pending.state
    else:
        log, after = RoundLog(number), state
        with log.timed(run, "cohort"):  # 1 choose the cohort
            members = round.members
            log.cohort = central.cohort(members, number) if central else choose_cohort(run, members, number)
        for phase in rule.exchanges(number):
            with log.timed(run, "train"):
                accumulator = rule.init(after, number, phase)
                if central:
                    accumulator = central.noised(accumulator, after, before, number)
                collection, counted = Collection(round, phase, after, log.cohort, before), set[str]()
                for update in collection:  # 2 send, 3 collect, 4 check
                    accumulator.add(update.site, update.arrays, update.weight)  # 5 aggregate as they arrive
                    log.note(update)
                    counted.add(update.site)
                log.take(collection.answers)
            _check_quorum(run, log, counted)
            with log.timed(run, "aggregate"):
                after, notes = accumulator.finish()  # 6 central noise, 7 step the global adapter
                log.leave_out(notes.excluded)
                if isinstance(accumulator, NoisedAccumulator):
                    log.noise = accumulator.noise
            _check_quorum(run, log, counted - notes.excluded.keys())
        if central:
            central.release(state, after, log)
    validation = None
    with log.timed(run, "evaluate"):  # 8 evaluate
        if run.config.measures_after(number):
            measured = measure(round, after, "validation", moved=log.norms)
            log.take(measured.answers)
            validation = measured.evaluation
    progress = _checkpoint(round, after, before, log, validation)  # 9 checkpoint, then record
    if central:
        central.finished()
    return after, progress


def _check_quorum(run: Run, log: RoundLog, counted: Set[str]) -> None:
    """Raise QuorumNotMet, naming who does not count and why, where too few sites do."""
    # With coins a cohort may be smaller than the quorum, and even empty, without anybody's fault.
    quorum = min(run.config.federation.quorum, len(log.cohort))
    if len(counted) >= quorum:
        return
    why = "; ".join(f"{site}: {e.reason}" for site, e in sorted(log.excluded.items()))
    raise QuorumNotMet(
        f"round {log.round} needs {quorum} of {len(log.cohort)} sites, {len(counted)} gave a good update "
        f"({why}); mend those sites or lower federation.quorum, then continue with --resume."
    )


def _start(run: Run, members: Members) -> tuple[GlobalState, Progress | None]:
    """Return the state to go on from: the seeded start, or the checkpoint's."""
    if run.resumed is None:
        return GlobalState(members.initial), None
    state, progress = run.resumed
    if progress.initial_hash != members.initial.content_hash:
        raise CheckpointError(
            f"{run.output_dir}: the sites no longer start from the adapter this run began with "
            "(another base model or library version); resume where it began, or start in another folder.",
            kind="other-start",
        )
    warn_of_changes(progress.sites, members.sites)
    # A kill may have come before or in the middle of this, and after the last round nothing else does it.
    drop_checkpoints(run.output_dir, progress, run.config.save_total_limit)
    return state, progress


def _checkpoint(
    round: Round, state: GlobalState, before: Progress | None, log: RoundLog, validation: Evaluation | None
) -> Progress:
    started = time.monotonic()
    run, members, number = round.run, round.members, round.number
    best = before.best if before else BestRound()
    if run.config.picks_best:
        best = best.after(run.config, number, validation)
    record = log.record(state.stored().content_hash, best.stops(run.config, number), round.head)
    metrics = RoundMetrics(round=number, train=log.train, validation=validation)
    progress = Progress(
        run_id=run.run_id,
        config_hash=run.config.content_hash,
        round=number,
        best_round=best.round,
        best_value=best.value,
        best_sites=dict(best.sites),
        rounds_without_improvement=best.without,
        initial_hash=members.initial.content_hash,
        sites=members.sites,
        refused=members.refused,
        record=record,
        metrics=metrics,
    )
    run.tell(PhaseBegan(round=number, name="checkpoint"))
    private = run.config.hides_participation
    save_checkpoint(run.output_dir, state, progress, run.config.save_total_limit, private=private)
    log.add_seconds("checkpoint", time.monotonic() - started)
    record = record.model_copy(update={"seconds": log.seconds})
    run.append(record, metrics)
    run.tell(RoundDone(record=record, metrics=metrics))
    return progress


def _check_stopping(run: Run, members: Members) -> None:
    """Raise ConfigError where a run is to stop by what it can never measure."""
    if run.config.evaluation.early_stopping_patience is None:
        return
    if members.late:  # one of them may have some
        return
    if not any(site.rows.get("validation") for site in members.sites.values()):
        raise ConfigError(
            "evaluation.early_stopping_patience: no site has validation rows to stop by; give the sites "
            "some, or leave it out."
        )
