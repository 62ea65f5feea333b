"""A site audits a result that it has received, on its own rows."""

from __future__ import annotations

from pathlib import Path

from quorate.client.audit.result_audit import Options, audit_result
from quorate.client.models.predictions import check_adapter_dir
from quorate.client.node.folder import SiteFolder
from quorate.client.site.delivered import RECEIVED
from quorate.client.site.site_data import SiteData
from quorate.shared.adapters.peft_export import ADAPTER_DIR, RUN_FILE
from quorate.shared.config.load import load_run
from quorate.shared.errors import OutputError
from quorate.shared.privacy.audit.audit_record import AUDIT_FILE, AuditRecord
from quorate.shared.process.files import BY_UMASK, write_atomically


def audit_received(folder: Path, run_id: str, options: Options) -> AuditRecord:
    """Audit STATE/received/RUN_ID; writes audit.json there.

    Raises: OutputError: no such result. AdapterError, DataError, ModelError: as `audit_result`.
    """
    held = SiteData(SiteFolder.find(folder), looks_only=True)
    received = held.folder.state / RECEIVED
    if not (received / run_id).is_dir():
        there = sorted(path.name for path in received.glob("*/")) if received.is_dir() else []
        raise OutputError(
            f"{received}: holds no result of run {run_id}; it has {', '.join(there) or 'none'}."
        )
    adapter_dir = received / run_id / ADAPTER_DIR
    check_adapter_dir(adapter_dir)
    run = load_run(adapter_dir / RUN_FILE)
    (site,) = held.names
    rows = {site: held.rows(run, site)}
    record = audit_result(held.at_hand(run), run.content_hash, adapter_dir, rows, "site", options)
    write_atomically(received / run_id / AUDIT_FILE, record.model_dump_json(indent=2) + "\n", BY_UMASK)
    return record
