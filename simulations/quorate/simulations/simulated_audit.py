"""Audit a simulated run from its own folder, with the rows of all its sites."""

from __future__ import annotations

from pathlib import Path

from quorate.client.audit.result_audit import Options, audit_result
from quorate.client.models.predictions import check_adapter_dir
from quorate.server.report import write_report
from quorate.server.rounds.run import RUN_FILE
from quorate.shared.adapters.peft_export import ADAPTER_DIR
from quorate.shared.config.load import load_run
from quorate.shared.config.privacy_config import ClientPrivacy
from quorate.shared.errors import ConfigError
from quorate.shared.privacy.audit.audit_record import AUDIT_FILE, AuditRecord
from quorate.shared.process.files import BY_UMASK, write_atomically
from quorate.shared.progress import OnStep, ignore_step
from quorate.simulations.canary_sites import audit_clients
from quorate.simulations.provenance import reopen


def audit(
    folder: Path, options: Options, *, site: str | None = None, on_step: OnStep = ignore_step
) -> AuditRecord:
    """Audit the run in `folder`; writes audit.json there, and its report again.

    Args:
        folder: the output folder of a simulated run that is done.
        site: attack this site's rows alone; site-level privacy is always audited with all of them.
    Raises: OutputError, DataError: as `reopen`. AdapterError: there is no adapter yet. ConfigError: no such
        site.
    """
    config, rows, _ = reopen(folder)
    check_adapter_dir(folder / ADAPTER_DIR)
    if site is not None and site not in rows:
        raise ConfigError(f"--site {site}: the run's sites are {', '.join(rows)}; name one of them.")
    chosen = {name: splits for name, splits in rows.items() if site in (None, name)}
    hashed = load_run(folder / RUN_FILE).content_hash
    client = None
    if isinstance(config.privacy, ClientPrivacy) and options.canaries:
        client = audit_clients(
            config, rows, count=options.canaries, confidence=options.confidence, on_step=on_step
        )
    record = audit_result(config, hashed, folder / ADAPTER_DIR, chosen, "simulation", options, on_step)
    record = record.model_copy(update={"client": client})
    write_atomically(folder / AUDIT_FILE, record.model_dump_json(indent=2) + "\n", BY_UMASK)
    write_report(folder)
    return record
