"""Let an adapter out only when an audit of it refuted nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import ValidationError

from quorate.shared.adapters.peft_export import WEIGHTS_FILE
from quorate.shared.errors import AuditMissing, OutputError
from quorate.shared.privacy.audit.audit_record import AUDIT_FILE, AuditRecord


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
        raise AuditMissing(
            f"{path}: is of another adapter than the one in {adapter_dir}; audit the run again."
        )
    if not record.attacks:
        raise AuditMissing(f"{path}: tried no attack; audit the run again without leaving parts out.")
    if record.refuted:
        raise AuditMissing(f"{path}: {'; '.join(record.refuted)}. Find out why before the adapter is used.")
