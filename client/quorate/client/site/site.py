"""The resident site: data, base model and trainer, an engine (`quorate.client.site.engine`) of one device.

In production a process holds one organisation and is asked one thing at a time. In simulation one process
holds every site, and the whole cohort is trained in one pass over the frozen base.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch

from quorate.client.privacy.units import check_shares_outcomes, groups_of, reported_seconds
from quorate.client.site.data_source import DataSource, InMemory, SiteRows
from quorate.client.site.delivered import keep_result
from quorate.client.site.device_errors import in_smaller_stacks, of_device
from quorate.client.site.head_statistics import check_head, head_statistics, own_start
from quorate.client.site.join import describe
from quorate.client.site.loaded import LoadedRuns, Resident
from quorate.client.site.local_baseline import train_local_baseline
from quorate.client.site.request import Request, failed
from quorate.client.site.request_checks import check_arrays, check_base_change, check_header, own_schema
from quorate.client.trainer.evaluate import evaluate
from quorate.client.trainer.fit import Fitted, SiteTask, fit
from quorate.client.trainer.optimizers import check_optimizer
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.adapters.selection import check_patterns, moving, uploaded
from quorate.shared.aggregation import GlobalState
from quorate.shared.config.privacy_config import SitePrivacy
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import NonFiniteUpdate, RequestRefused
from quorate.shared.metrics.head_sums import SUMMED
from quorate.shared.progress import OnStep, ignore_step
from quorate.shared.protocol.messages import BEST_ROUND, Split, Update
from quorate.shared.protocol.versions import check_versions

log = logging.getLogger(__name__)


class Site:
    """Answers requests for the sites whose rows it holds.

    Args:
        rows: site name -> split -> rows, or whoever finds them (and the base model) for a run.
        device: where to train; the first visible GPU, else the CPU, when left out.
        as_given: names of which all training rows are used, whatever `training.examples_per_class` says: the
            reference that holds what the sites have drawn.
        received: folder for the results of runs; none are taken when left out.
        on_model: told when a base model is in memory, and when it is let go of.
    """

    def __init__(
        self,
        rows: Mapping[str, SiteRows] | DataSource,
        *,
        device: torch.device | None = None,
        on_step: OnStep = ignore_step,
        as_given: Collection[str] = (),
        received: Path | None = None,
        on_model: Callable[[bool], None] = lambda loaded: None,
    ) -> None:
        source = InMemory(rows) if isinstance(rows, Mapping) else rows
        self._prepared = LoadedRuns(source, device, as_given, on_model)
        self._received_dir = received
        self._on_step = on_step

    @property
    def names(self) -> tuple[str, ...]:
        return self._prepared.source.names

    def handle_many(self, requests: Sequence[Request]) -> list[Update]:
        """Answer requests, in order; those of one round that start from one base are trained as stacks.

        The text of an error may quote data, so it goes to this process's log and never into an update.
        """
        answers: dict[int, Update] = {}
        passes: dict[object, list[int]] = {}
        for index, request in enumerate(requests):
            try:
                self._admit(request)
            except Exception as error:  # any failure must reach the coordinator as a code, and no further
                answers[index] = failed(request, of_device(error) or error)
            else:
                passes.setdefault(_pass_of(request) or index, []).append(index)
        for members in passes.values():
            size = requests[members[0]].run.training.max_stack
            for start in range(0, len(members), size):
                stack = members[start : start + size]
                done = in_smaller_stacks(self._answer, [requests[index] for index in stack])
                answers.update(zip(stack, done, strict=True))
        return [answers[index] for index in range(len(requests))]

    def prepare(self, run: RunConfig) -> RunConfig:
        """Load the base model and make every site's rows ready, so that what is wrong shows before round 1.

        Returns: the run with its model's hash filled in.
        Raises: ModelError, DataError: naming the site.
        """
        resident = self._prepared.load(run)
        pinned = run.model.model_copy(update={"sha256": resident.model.sha256})
        resident.run = run.model_copy(update={"model": pinned})
        check_patterns(run, resident.model.initial)
        check_optimizer(run.training, resident.model.peft.device)
        for site in self.names:
            for split in ("train", "validation", "test"):
                self._prepared.examples(resident, site, split)
            self._prepared.claim(resident, site)
        for site in self.names[:1]:
            check_head(resident, self._prepared.examples(resident, site, "train"))
        log.debug("prepared %d sites on %s", len(self.names), resident.model.peft.device)
        return resident.run

    def samples(self, run: RunConfig, states: Sequence[GlobalState]) -> list[list[tuple[str, str]]]:
        resident = self._prepared.load(run)
        answers = []
        for state in states:
            resident.model.set_residual(state.residual)
            resident.stack.load([state.adapter], ())
            answers.append(run.task.samples(resident.model.peft, resident.model.processor))
        return answers

    def _admit(self, request: Request) -> None:
        """Hold a request against the run and the base model that it names, and read what it trains on."""
        if request.header.site not in self.names:
            raise RequestRefused(f"this process does not answer for site {request.header.site!r}.")
        check_header(request)
        resident = self._prepared.load(request.run)
        check_arrays(request, resident.model.initial)
        check_base_change(resident.model, request.state.residual, self._prepared.source.base_limits)
        if request.header.phase == "fit":
            self._prepared.examples(resident, request.header.site, "train")

    def _answer(self, requests: Sequence[Request]) -> list[Update]:
        resident = self._prepared.load(requests[0].run)
        phase = requests[0].header.phase
        if phase == "fit":
            return self._fit(resident, requests)
        one = {
            "join": self._join,
            "start": self._start,
            "statistics": self._statistics,
            "evaluate": self._evaluate,
            "alone": self._alone,
            "finish": self._finish,
        }[phase]
        return [one(resident, request) for request in requests]

    def _join(self, resident: Resident, request: Request) -> Update:
        run, site, prepared = resident.run, request.header.site, self._prepared
        check_versions(request.header.versions)
        check_patterns(run, resident.model.initial)
        check_optimizer(run.training, resident.model.peft.device)
        claim = prepared.claim(resident, site)
        if claim is not None:
            log.info("%s: %s", site, claim.sentence)
        examples = {split: prepared.examples(resident, site, split) for split in get_args(Split)}
        check_head(resident, examples["train"])
        description = describe(
            run,
            resident.model,
            examples,
            prepared.rows(run, site, "train"),
            len(prepared.source.rows(run, site).get("train", ())),
            claim,
        )
        return Update.reply(request, description=description)

    def _start(self, resident: Resident, request: Request) -> Update:
        return Update.reply(request, resident.model.initial)

    def _statistics(self, resident: Resident, request: Request) -> Update:
        started, site = time.monotonic(), request.header.site
        resident.model.set_residual(Adapter({}))
        train, validation = (self._prepared.examples(resident, site, split) for split in SUMMED)
        sums = head_statistics(resident, train, validation, self._prepared.source.fewest_for_statistics)
        return Update.reply(
            request,
            sums,
            num_examples=resident.run.task.num_rows(train),
            seconds=reported_seconds(resident.run, time.monotonic() - started),
        )

    def _evaluate(self, resident: Resident, request: Request) -> Update:
        started = time.monotonic()
        split = request.header.split
        assert split is not None, "check_header"
        check_shares_outcomes(resident.run)
        state = self._received(resident, request)
        examples = self._prepared.examples(resident, request.header.site, split)
        outcomes = evaluate(resident.stack, resident.run, state.adapter, examples)
        return Update.reply(
            request,
            outcomes=outcomes,
            num_examples=len(examples),
            seconds=reported_seconds(resident.run, time.monotonic() - started),
        )

    def _alone(self, resident: Resident, request: Request) -> Update:
        started, site = time.monotonic(), request.header.site
        if resident.run.privacy is not None:
            raise RequestRefused(
                "training alone under differential privacy would spend what nothing accounts for; have the "
                "coordinator leave evaluation.references out.",
                code="policy-privacy",
            )
        resident.model.set_residual(Adapter({}))
        train, validation, test = (
            self._prepared.examples(resident, site, split) for split in ("train", "validation", "test")
        )
        task = SiteTask(site, train, own_start(resident, train, validation))
        done = train_local_baseline(resident, task, validation, test, self._on_step)
        return Update.reply(
            request,
            outcomes=done.outcomes,
            num_examples=len(test),
            metrics={BEST_ROUND: float(done.round)},
            seconds=time.monotonic() - started,
        )

    def _finish(self, resident: Resident, request: Request) -> Update:
        state = self._completed(resident, request)
        claim = self._prepared.claim_kept(resident.run, request.header.site)
        folder = keep_result(self._received_dir, resident.run, request.header, state, claim)
        log.info("run %s is done; its result lies in %s", request.header.run_id, folder)
        return Update.reply(request)

    def _fit(self, resident: Resident, requests: Sequence[Request]) -> list[Update]:
        """Train the requests' sites as one stack: the rule's site half around the trainer."""
        started = time.monotonic()
        run, round = resident.run, requests[0].header.round
        states = [self._received(resident, request) for request in requests]
        tasks = [
            self._task(resident, request.header.site, state.adapter)
            for request, state in zip(requests, states, strict=True)
        ]
        trainable = moving(run, resident.model.initial, round)
        fitted = fit(resident.stack, run, round, tasks, trainable, self._on_step)
        seconds = reported_seconds(run, (time.monotonic() - started) / len(requests))
        return [
            _uploaded(run, *answer, seconds) for answer in zip(requests, tasks, states, fitted, strict=True)
        ]

    def _task(self, resident: Resident, site: str, start: Adapter) -> SiteTask:
        groups = groups_of(resident.run, site, self._prepared.rows(resident.run, site, "train"))
        return SiteTask(site, self._prepared.examples(resident, site, "train"), start, groups)

    def _received(self, resident: Resident, request: Request) -> GlobalState:
        """Complete what was sent, and put its residual into the base."""
        state = self._completed(resident, request)
        resident.model.set_residual(state.residual, self._prepared.source.base_limits.admit)
        return state

    def _completed(self, resident: Resident, request: Request) -> GlobalState:
        """Complete what was sent by the seeded start."""
        sent, initial = request.state, resident.model.initial
        return GlobalState(initial.cropped(own_schema(request, initial)).updated(sent.adapter), sent.residual)


def _pass_of(request: Request) -> tuple[object, ...] | None:
    """Return what requests have in common that can share a pass; None for one that shares none."""
    header = request.header
    if header.phase != "fit":
        return None
    return header.config_hash, header.round, request.state.residual.content_hash


def _uploaded(
    run: RunConfig, request: Request, task: SiteTask, state: GlobalState, done: Fitted, seconds: float
) -> Update:
    """Return what leaves the site after training, or that it diverged."""
    if not all(map(math.isfinite, done.metrics.values())):
        # Only this site's answer: those it was stacked with never saw its numbers.
        return failed(request, NonFiniteUpdate("training diverged; lower training.learning_rate."))
    arrays = uploaded(run, done.adapter, state, request.header.round)
    private = isinstance(run.privacy, SitePrivacy)  # then nobody is told how many tokens the rows have
    return Update.reply(
        request,
        arrays,
        num_examples=run.task.num_rows(task.examples),
        num_tokens=0 if private else run.task.num_tokens(task.examples),
        num_steps=done.steps,
        metrics=done.metrics,
        seconds=seconds,
    )
