"""Audit the result of a run: its private training, and the adapter that was released, or is to be."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from quorate.client.audit.mechanism import audit_mechanism
from quorate.client.audit.membership_attack import Rows, membership
from quorate.client.audit.shadow_models import Shadow
from quorate.client.audit.token_leak import NotChecked, token_leaks
from quorate.client.models.predictions import check_adapter_dir
from quorate.client.node.folder import SiteFolder
from quorate.client.privacy.units import plan_of
from quorate.client.site.data_source import SiteRows
from quorate.client.site.delivered import RECEIVED
from quorate.client.site.site_data import SiteData
from quorate.client.trainer.sampling import few_shot
from quorate.shared.adapters.peft_export import ADAPTER_DIR, RUN_FILE, WEIGHTS_FILE
from quorate.shared.config.load import load_run
from quorate.shared.config.privacy_config import SitePrivacy
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import AuditMissing, OutputError
from quorate.shared.privacy.audit.audit_record import (
    AUDIT_FILE,
    AuditRecord,
    MechanismAudit,
    MembershipAudit,
    TokenLeak,
)
from quorate.shared.process.files import BY_UMASK, write_atomically
from quorate.shared.progress import OnStep, ignore_step
from quorate.shared.protocol.messages import Split
from quorate.shared.tasks.task import Row


@dataclass(frozen=True)
class Options:
    """How thorough an audit is.

    Args:
        canaries: at each site, for the private training; 0 leaves that part out.
        confidence: of its bounds.
        pairs: half the number of reference adapters of the membership attack; 0 leaves that part out.
        tokens: most tokens of each kind of the token-leak check; 0 leaves that part out.
    """

    canaries: int = 500
    confidence: float = 0.999
    pairs: int = 2
    tokens: int = 500


def audit_result(
    run: RunConfig,
    config_hash: str,
    adapter_dir: Path,
    rows: Mapping[str, SiteRows],
    held_by: Literal["simulation", "site"],
    options: Options,
    on_step: OnStep = ignore_step,
) -> AuditRecord:
    """Audit a run on the rows of some of its sites.

    Args:
        run: the run, with its base model named as it lies here.
        config_hash: of the run as it was made.
        rows: site -> split -> rows.
    Raises: DataError: too few rows. ConfigError, ModelError, AdapterError: as in a run.
    """
    used = {site: few_shot(run, site, splits.get("train", ())) for site, splits in rows.items()}
    shadow = Shadow.of(run)
    claims = [plan.claim() for site, each in used.items() if (plan := plan_of(run, site, each)) is not None]
    mechanism: tuple[MechanismAudit, ...] = ()
    if isinstance(run.privacy, SitePrivacy) and options.canaries:
        mechanism = audit_mechanism(
            shadow, used, canaries=options.canaries, confidence=options.confidence, on_step=on_step
        )
    attacked = None
    if options.pairs:
        members = [row for each in used.values() for row in each]
        about = Rows(members, _all(rows, "test"), _all(rows, "validation"))
        attacked = MembershipAudit(
            references=2 * options.pairs,
            attack=membership(shadow, adapter_dir, about, pairs=options.pairs, on_step=on_step),
            epsilon=max((claim.epsilon for claim in claims), default=None),
            delta=max((claim.delta for claim in claims), default=0.0),
        )
    leaks: tuple[TokenLeak, ...] = ()
    left_out: tuple[str, ...] = ()
    if options.tokens:
        try:
            leaks = token_leaks(shadow, used, tokens=options.tokens, on_step=on_step)
        except NotChecked as why:
            left_out = (str(why),)
    return AuditRecord(
        config_hash=config_hash,
        adapter_sha256=hashlib.sha256((adapter_dir / WEIGHTS_FILE).read_bytes()).hexdigest(),
        held_by=held_by,
        mechanism=mechanism,
        membership=attacked,
        token_leaks=leaks,
        left_out=left_out,
    )


def _all(rows: Mapping[str, SiteRows], split: Split) -> list[Row]:
    return [row for splits in rows.values() for row in splits.get(split, ())]


def audit_received(folder: Path, run_id: str, options: Options) -> AuditRecord:
    """Audit STATE/received/RUN_ID; writes audit.json there.

    Raises: OutputError: no such result. AdapterError, DataError, ModelError: as `audit_result`.
    """
    held = SiteData(SiteFolder.find(folder), looks_only=True)
    received = held.folder.state / RECEIVED
    if not (received / run_id).is_dir():
        there = sorted(path.name for path in received.glob("*/")) if received.is_dir() else []
        message = f"{received}: holds no result of run {run_id}; it has {', '.join(there) or 'none'}."
        raise OutputError(message)
    adapter_dir = received / run_id / ADAPTER_DIR
    check_adapter_dir(adapter_dir)
    run = load_run(adapter_dir / RUN_FILE)
    (site,) = held.names
    rows = {site: held.rows(run, site)}
    record = audit_result(held.at_hand(run), run.content_hash, adapter_dir, rows, "site", options)
    write_atomically(received / run_id / AUDIT_FILE, record.model_dump_json(indent=2) + "\n", BY_UMASK)
    return record


def check_audited(adapter_dir: Path) -> None:
    """Hold the audit beside an adapter folder against the adapter.

    Raises: AuditMissing: there is none, it is of other weights, it tried nothing, or it refutes a claim.
        OutputError: it is damaged.
    """
    path = adapter_dir.parent / AUDIT_FILE
    if not path.is_file():
        raise AuditMissing(f"{path}: there is none; make it with `quorate audit {adapter_dir.parent}`.")
    try:
        record = AuditRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise OutputError(f"{path}: is damaged; audit the run again.") from error
    if record.adapter_sha256 != hashlib.sha256((adapter_dir / WEIGHTS_FILE).read_bytes()).hexdigest():
        message = f"{path}: is of another adapter than the one in {adapter_dir}; audit the run again."
        raise AuditMissing(message)
    if not record.attacks:
        raise AuditMissing(f"{path}: tried no attack; audit the run again without leaving parts out.")
    if record.refuted:
        raise AuditMissing(f"{path}: {'; '.join(record.refuted)}. Find out why before the adapter is used.")
