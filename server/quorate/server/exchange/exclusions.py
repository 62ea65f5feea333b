"""Why an answer does not count: codes, and the words for them."""

from __future__ import annotations

from quorate.server.exchange.flower_messages import UNREACHABLE
from quorate.server.tracking.records import Exclusion

REASONS = {
    "timeout": "did not reply in time",
    "away": "has not answered since an earlier exchange; it is asked again, and counts once it answers",
    "absent": "is not connected; its IT can see why with `quorate site status`",
    "unreachable": "could not be reached, or its ClientApp failed; the logs of Flower say why",
    "data": "could not use its own data; its log says why",
    "model": "could not load or adapt the base model; its log says why",
    "refused": "refused the request; its log says which rule",
    "policy-task": "its policy does not allow this task",
    "policy-data": "its policy does not allow this data alias, or it holds no such data",
    "policy-model": "its policy does not list the base model's sha256, or the run does not name it",
    "policy-rank": "its policy allows no adapter of this rank",
    "policy-aggregation": "its policy does not allow this aggregation rule",
    "policy-base": "its policy lets no rule change its base model so far",
    "policy-modules-to-save": "its policy does not allow a part of the model to be trained whole",
    "policy-head": "its policy allows no head with so many hidden units",
    "policy-statistics": "its policy lets no sums over its rows leave, or asks that they be over more rows",
    "policy-rows": "has fewer training rows than its policy asks for",
    "policy-rounds": "its policy allows fewer rounds",
    "policy-steps": "its policy allows fewer optimiser steps in a round",
    "policy-minutes": "has worked as long on a round, or in a day, as its policy allows",
    "policy-runs": "has begun as many runs in a day as its policy allows",
    "site-file": "has a site.yaml that cannot be used; its log says what is wrong in it",
    "policy-approval": "a person at the site must approve this run first (quorate site approve)",
    "policy-privacy": "asks for differential privacy, or the run's privacy does not cover the request",
    "policy-budget": "has too little privacy budget left for this run, or none for its unit of privacy",
    "ledger": "has a privacy ledger that is not as it was written; its people must look into it",
    "out-of-memory": "has too little memory for this run: lower training.per_device_train_batch_size, or set "
    "training.gradient_checkpointing",
    "device-lost": "lost its GPU in the middle of the work, and is starting again; its log says why",
    "withdrawn": "was withdrawn from this run by its people",
    "bundle": "did not admit the bundle of code; both sides need the same release of quorate",
    "other-config": "knows this run id under another run configuration",
    "conflict": "has answered this round from another start",
    "outdated": "has answered a later round of this run",
    "oversized": "got a message above its size limit",
    "expired": "got the request too late, or was not up again in time",
    "protocol": "sent something that is not an answer to the request",
    "non-finite": "sent an update with NaN or infinity, or its training diverged: lower the learning rate",
    "adapter": "sent arrays with other names or shapes than were asked for",
    "rows": "answered for other rows than it joined with",
    "norm": "moved further than federation.max_update_norm",
    "version": "runs another release of Quorate or of a library; install the one that the server runs",
    "config": "worked under another run configuration, or cannot use this one; its log says why",
}

TRANSIENT = (UNREACHABLE,)
"""Codes that a site may recover from by itself: a process that was killed or is starting again."""


def exclusion(code: str, reason: str | None = None) -> Exclusion:
    """Return why a site does not count, in words."""
    return Exclusion(code=code, reason=reason or REASONS.get(code, "failed; its log says why"))
