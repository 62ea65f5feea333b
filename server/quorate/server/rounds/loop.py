"""The main path of Quorate: the rounds of a run, as numbered steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from flwr.serverapp import Grid

from quorate.server.exchange.exchange import in_order
from quorate.server.exchange.join import Members, answers_of, join, request, warn_of_changes
from quorate.server.exchange.latecomers import Latecomers
from quorate.server.privacy.central_dp import CentralPrivacy
from quorate.server.rounds.best_round import BestRound
from quorate.server.rounds.checkpoint import Progress, drop_checkpoints, save_checkpoint
from quorate.server.rounds.cohort import choose_cohort
from quorate.server.rounds.measuring import measure
from quorate.server.rounds.round_log import Books, round_seconds
from quorate.server.rounds.run import Run
from quorate.server.rounds.screening import Screen, room
from quorate.server.rounds.update_checks import check_trained
from quorate.server.tracking.records import ClientClaim, Evaluation, RoundMetrics
from quorate.shared.adapters.selection import downloaded, upload_schema
from quorate.shared.aggregation import GlobalState
from quorate.shared.errors import CheckpointError, ConfigError, ModelDiverged, QuorumNotMet
from quorate.shared.protocol.messages import RoundRequest, Update

log = logging.getLogger(__name__)


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

    @property
    def status(self) -> Literal["done", "interrupted", "quorum-not-met", "diverged"]:
        """How the run ended."""
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
        grid: reaches the sites.
        run: what is asked of them.
        names: node id -> site, where the server knows them by their keys; sites then answer under no other
            name. None: sites say their names themselves, as in a simulation.
    Raises: QuorumNotMet: too few sites could join. BadInput: the run cannot be carried out as asked.
    """
    members = join(grid, run, names)
    _check_stopping(run, members)
    state, progress = _start(run, members)
    central = CentralPrivacy.open(run, members, state, progress)
    run.tell(
        "start", run.config, run.run_id, run.output_dir, members.sites, progress.round if progress else 0
    )
    result = Result(state, progress, members, central=central)
    latecomers = Latecomers(grid, run, members, names)
    first = progress.round + 1 if progress else 1
    try:
        for round in range(first, run.config.federation.rounds + 1):
            if result.early is not None:
                break
            latecomers.take(round)
            result.state, result.progress = run_round(
                grid, run, members, result.state, result.progress, round, central
            )
    except (KeyboardInterrupt, QuorumNotMet, ModelDiverged) as stop:
        result.stopped = stop
        result.state, result.progress = run.reload() or (result.state, result.progress)
    return result


def run_round(
    grid: Grid,
    run: Run,
    members: Members,
    state: GlobalState,
    before: Progress | None,
    round: int,
    central: CentralPrivacy | None = None,
) -> tuple[GlobalState, Progress]:
    """Run one round from `state`; returns the state after it and the progress that was checkpointed.

    Raises: QuorumNotMet: fewer good updates than federation.quorum. ModelDiverged: no site can measure what
        came of them; the round then leaves no checkpoint.
    """
    if central and (pending := central.take_pending(round)):  # steps 1 to 7, done before a kill
        state, cohort, books = pending.state, pending.released.cohort, pending.released.books
    else:
        books = Books()
        state, cohort = _step(grid, run, members, state, before, round, central, books)
    validation = None
    with books.timed(run, round, "evaluate"):  # 8 evaluate
        if run.config.measures_after(round):
            validation, _ = measure(grid, run, members, state, "validation", round, books)
    # 9 checkpoint, then record
    progress = _finish(run, members, state, before, round, cohort, books, validation)
    if central:
        central.finished()
    return state, progress


def _step(
    grid: Grid,
    run: Run,
    members: Members,
    state: GlobalState,
    before: Progress | None,
    round: int,
    central: CentralPrivacy | None,
    books: Books,
) -> tuple[GlobalState, tuple[str, ...]]:
    """Steps 1 to 7: return the next state and the sites that were asked, and note the rest in `books`."""
    rule = run.config.aggregation
    with books.timed(run, round, "cohort"):  # 1 choose the cohort
        cohort = central.cohort(members, round) if central else choose_cohort(run, members, round)
    with books.timed(run, round, "train"):  # 2 send, 3 collect, 4 check, 5 aggregate as updates arrive
        accumulator = rule.init(state, round)
        clipped = central.clipped_sum(state, before, round) if central else None
        for site, update, weight in _trained(grid, run, members, state, before, cohort, round, books):
            if clipped is None:
                rule.add(accumulator, update.arrays, weight)
            else:
                clipped.add(update.arrays)
            books.note(site, update, weight)
    # With coins a cohort may be smaller than the quorum, and even empty, without anybody's fault.
    quorum = min(run.config.federation.quorum, len(cohort))
    if len(books.num_examples) < quorum:
        raise _quorum_not_met(quorum, round, cohort, books)
    with books.timed(run, round, "aggregate"):
        if central and clipped:  # 6 central noise: the rule sees the noised mean as the only update there is
            rule.add(accumulator, central.noised_mean(clipped, books), 1.0)
        after = rule.finish(accumulator, state, round)  # 7 step the global adapter
    if central:
        central.release(state, after, round, cohort, books)
    return after, cohort


def _trained(
    grid: Grid,
    run: Run,
    members: Members,
    state: GlobalState,
    before: Progress | None,
    cohort: tuple[str, ...],
    round: int,
    books: Books,
) -> Iterator[tuple[str, Update, float]]:
    """Steps 2 to 4: yield (site, update, weight) for every good update of the cohort, as they arrive."""
    federation, rule = run.config.federation, run.config.aggregation
    quorum = min(federation.quorum, len(cohort))
    answers = answers_of(run, members.by_node, members.presence, quorum=quorum)
    schema = upload_schema(run.config, members.initial.schema, round)

    def check(_request: RoundRequest, update: Update) -> None:
        site = update.header.site
        books.norms[site] = check_trained(
            update,
            schema,
            state.adapter,
            members.sites[site].rows.get("train", 0),
            federation.max_update_norm,
            rule.weighting,
        )

    arrays = downloaded(run.config, state, round)
    asked = {members.nodes[site]: request(run, round, "fit", site, arrays) for site in cohort}
    arriving = answers.ask(grid, asked, check)
    if run.config.private_clients:
        # Whom another site's update would set aside, no noise hides; updates are clipped instead. Order
        # decides the last bits of a sum, which noise drowns; without it no update is held for another.
        yield from ((site, update, 1.0) for site, update in arriving)
    else:
        norm = state.adapter.subset(schema).l2_norm
        last = list(before.record.update_norms.values()) if before else []
        rows = {site: members.sites[site].rows.get("train", 0) for site in cohort}
        further = room(run.config.training, rows)
        screen = Screen(federation, len(cohort), norm, last, books.norms, books.excluded, further)
        yield from screen.passed(
            (site, update, rule.weight(update.header.num_examples, update.header.num_tokens))
            for site, update in in_order(cohort, answers, arriving)
        )
    members.pace = max(members.pace, answers.longest)
    books.take(answers)


def _start(run: Run, members: Members) -> tuple[GlobalState, Progress | None]:
    """Return the state to go on from: the seeded start, or the checkpoint's."""
    if run.resumed is None:
        return GlobalState(members.initial), None
    state, progress = run.resumed
    if progress.initial_hash != members.initial.content_hash:
        raise CheckpointError(
            f"{run.output_dir}: the sites no longer start from the adapter this run began with "
            "(another base model or library version); resume where it began, or start in another folder."
        )
    warn_of_changes(progress.sites, members.sites)
    # A kill may have come before or in the middle of this, and after the last round nothing else does it.
    drop_checkpoints(run.output_dir, progress, run.config.save_total_limit)
    return state, progress


def _finish(
    run: Run,
    members: Members,
    state: GlobalState,
    before: Progress | None,
    round: int,
    cohort: tuple[str, ...],
    books: Books,
    validation: Evaluation | None,
) -> Progress:
    """Step 9: checkpoint, then record."""
    started = time.monotonic()
    standing = before.best if before else BestRound()
    if run.config.picks_best:
        standing = standing.after(run.config, round, validation)
    early_stop = standing.stops(run.config, round)
    record = books.record(round, cohort, state.pack().content_hash, early_stop)
    metrics = RoundMetrics(round=round, train=books.train, validation=validation)
    progress = Progress(
        run_id=run.run_id,
        config_hash=run.config.content_hash,
        round=round,
        best_round=standing.round,
        best_value=standing.value,
        best_sites=dict(standing.sites),
        rounds_without_improvement=standing.without,
        initial_hash=members.initial.content_hash,
        sites=members.sites,
        refused=members.refused,
        record=record,
        metrics=metrics,
    )
    run.tell("phase", round, "checkpoint")
    private = run.config.hides_participation
    save_checkpoint(run.output_dir, state, progress, run.config.save_total_limit, private=private)
    seconds = {**books.seconds, "checkpoint": round_seconds(time.monotonic() - started)}
    record = record.model_copy(update={"seconds": seconds})
    run.append(record, metrics)
    run.tell("round", record, metrics)
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


def _quorum_not_met(quorum: int, round: int, cohort: tuple[str, ...], books: Books) -> QuorumNotMet:
    why = "; ".join(f"{site}: {e.reason}" for site, e in sorted(books.excluded.items()))
    return QuorumNotMet(
        f"round {round} needs {quorum} of {len(cohort)} sites, "
        f"{len(books.num_examples)} gave a good update ({why}); mend those sites or lower federation.quorum, "
        "then continue with --resume."
    )
