"""What a site allows: rules of `site.yaml`, held against a request before any data are read.

A refusal's rule, value and remedy go to the site's log; its code alone reaches the coordinator.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from quorate.client.policy.approvals import RUN_ID, is_approved, is_withdrawn, note_waiting
from quorate.client.policy.site_config import PolicyConfig, SiteConfig
from quorate.client.site.request import Handler, Request, failed
from quorate.client.site.request_checks import check_header
from quorate.shared.config.privacy_config import SitePrivacy
from quorate.shared.config.run_config import AdapterConfig, RunConfig
from quorate.shared.errors import ProtocolError, RequestRefused
from quorate.shared.protocol.messages import Update


class Gate:
    """A handler that lets through what the policy allows.

    Args:
        state: the site's state folder, where approvals lie.
        inner: answers what is let through.
    """

    def __init__(self, site: SiteConfig, state: Path, inner: Handler) -> None:
        self._site = site
        self._state = state
        self._inner = inner

    def handle(self, request: Request) -> Update:
        try:
            admit(request, self._site, self._state)
        except Exception as error:  # whatever it is, only its code leaves
            return failed(request, error)
        update = self._inner.handle(request)
        if is_withdrawn(self._state, request.header.run_id):  # while this was worked on
            return failed(request, _withdrawn(request.header.run_id))
        return update


def admit(request: Request, site: SiteConfig, state: Path) -> None:
    """Hold a request against the site's policy. Reads no data and no model.

    Raises: RequestRefused: a rule says no. ProtocolError, NonFiniteUpdate: the message is wrong in itself.
    """
    run, policy, run_id = request.run, site.policy, request.header.run_id
    if not re.fullmatch(RUN_ID, run_id):
        raise ProtocolError("the run id is not made of letters, digits, dashes and underscores alone.")
    if is_withdrawn(state, run_id):
        raise _withdrawn(run_id)
    check_header(request)
    _allowed("policy.tasks", "task", run.task.name, policy.tasks, "policy-task")
    aliases = tuple(alias for alias in site.data if policy.data is None or alias in policy.data)
    _allowed("policy.data" if policy.data is not None else "data", "data", run.data, aliases, "policy-data")
    _model(run, site)
    rank = run.adapter.r
    _at_most("max_rank", policy.max_rank, rank, f"asks for rank {rank}", "adapter.r", "policy-rank")
    _allowed("policy.aggregation", "rule", run.aggregation.name, policy.aggregation, "policy-aggregation")
    _trained_whole(run.adapter, policy)
    _long(run, site)
    if request.header.phase == "statistics" and not policy.head_statistics:
        raise RequestRefused(
            "policy.head_statistics is off, and the run asks for sums over the rows, to solve its head from; "
            "turn it on in site.yaml if they may leave, or have the coordinator choose adapter.head.init: "
            "random.",
            code="policy-statistics",
        )
    if policy.require_privacy and not isinstance(run.privacy, SitePrivacy):
        raise RequestRefused(
            "policy.require_privacy is on, and for this run no noise would be added at this site; have the "
            "coordinator set privacy.unit to record or group in the run file.",
            code="policy-privacy",
        )
    if policy.approve_each_run and not is_approved(state, run_id, request.header.config_hash):
        note_waiting(state, run_id, request.header.run_config)
        raise RequestRefused(
            f"policy.approve_each_run is on and nobody has approved run {run_id}; read "
            f"{state}/waiting/{run_id}.json, then `quorate site approve {run_id}`.",
            code="policy-approval",
        )
    request.arrays.check_finite()


def _withdrawn(run_id: str) -> RequestRefused:
    return RequestRefused(
        f"withdrawn: a person took this site out of run {run_id}; to take part again, "
        f"`quorate site withdraw {run_id} --undo`.",
        code="withdrawn",
    )


def check_rows(site: SiteConfig, alias: str, count: int) -> None:
    """Hold the number of training rows against the policy, before anything is done with the rows.

    Raises: RequestRefused: there are too few.
    """
    if count < site.policy.min_rows:
        raise RequestRefused(
            f"policy.min_rows is {site.policy.min_rows}, data.{alias} has {count} training rows; lower "
            "policy.min_rows in site.yaml, or give the site more rows.",
            code="policy-rows",
        )


def check_steps(site: SiteConfig, run: RunConfig, units: int) -> None:
    """Hold the work of a round, which epochs make of rows, against the policy.

    What is counted is passes and rows, as one optimiser step may be any number of either.

    Args:
        units: training rows (or groups, where they are what is protected) that the run uses here.
    Raises: RequestRefused: there are too many.
    """
    training = run.training
    size, accumulated = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if training.max_steps is not None:
        passes = training.max_steps * accumulated
        rows = passes * size
    else:
        passes = training.num_train_epochs * math.ceil(units / size)
        rows = training.num_train_epochs * units
    if isinstance(run.privacy, SitePrivacy) and run.privacy.unit == "group":
        rows *= run.privacy.max_records_per_group
    for name, asked in {"max_steps_per_round": passes, "max_rows_per_round": rows}.items():
        most = getattr(site.policy, name)
        if most is not None and asked > most:
            raise RequestRefused(
                f"policy.{name} is {most}, and the run asks for {asked} a round here; raise it in site.yaml, "
                "or have the coordinator lower training.max_steps (or num_train_epochs), "
                "gradient_accumulation_steps or per_device_train_batch_size.",
                code="policy-steps",
            )


def _long(run: RunConfig, site: SiteConfig) -> None:
    """Limit the work that a run asks for by its own words; `quorate.client.policy.limits` holds the clock."""
    if run.training.max_steps is not None:
        check_steps(site, run, 0)  # whatever the rows are
    rounds, most = run.federation.rounds, site.policy.max_rounds
    _at_most("max_rounds", most, rounds, f"has {rounds} rounds", "federation.rounds", "policy-rounds")


def _model(run: RunConfig, site: SiteConfig) -> None:
    sha256, listed = run.model.sha256, [model.sha256 for model in site.models]
    if sha256 is None:
        raise RequestRefused(
            "models: the run names its base model by path alone, and a path says nothing about what lies "
            "there; have the coordinator set model.sha256 in the run file.",
            code="policy-model",
        )
    if sha256 not in listed:
        raise RequestRefused(
            f"models lists {', '.join(each[:12] for each in listed) or 'no model'}, the run asks for the "
            f"model with sha256 {sha256}; if that one may be used here, get it and add its folder and sha256 "
            "to models in site.yaml.",
            code="policy-model",
        )


def _trained_whole(adapter: AdapterConfig, policy: PolicyConfig) -> None:
    """Limit what max_rank does not: parts of the model, and layers of a head, that are trained whole."""
    for module in adapter.modules_to_save or ():
        _allowed("policy.modules_to_save", "module", module, policy.modules_to_save, "policy-modules-to-save")
    units = sum(adapter.head.hidden_sizes) if adapter.head is not None else 0
    asks, field = f"asks for a head of {units} hidden units", "adapter.head.hidden_sizes"
    _at_most("max_head_units", policy.max_head_units, units, asks, field, "policy-head")


def _at_most(rule: str, most: int | None, asked: int, asks: str, field: str, code: str) -> None:
    if most is not None and asked > most:
        raise RequestRefused(
            f"policy.{rule} is {most}, the run {asks}; raise policy.{rule} in site.yaml, or have the "
            f"coordinator lower {field}.",
            code=code,
        )


def _allowed(rule: str, what: str, asked: str, allowed: Sequence[str] | None, code: str) -> None:
    if allowed is not None and asked not in allowed:
        raise RequestRefused(
            f"{rule} allows {', '.join(allowed) or 'nothing'}, the run asks for {what} {asked}; add it in "
            "site.yaml if that may be, or have the coordinator change the run file.",
            code=code,
        )
