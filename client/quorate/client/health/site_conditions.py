"""What would make a site's next round fail, looked at quickly: disks, ledger, certificates, models, data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from quorate.client.health.credentials import authority, client_certificate
from quorate.client.node.folder import NOT_FILES, SITE_YAML, SiteFolder
from quorate.shared.errors import ModelError
from quorate.shared.model.sources import resolve_local
from quorate.shared.process.looks import Line, check_room, line


def storage(site: SiteFolder) -> list[Line]:
    """Look at the disks that a site writes to, and at its privacy ledger."""
    return [line("disk", lambda: _disk(site)), line("ledger", lambda: ledger(site))]


def certificates(site: SiteFolder) -> list[Line]:
    """Look at the certificates on this machine; `server_lines` looks at the one that the server shows."""
    lines = [line("ca.crt", lambda: authority(site))]
    if site.connection.mutual_tls:
        lines.append(line("client.crt", lambda: client_certificate(site)))
    return lines


def models_and_data(site: SiteFolder) -> list[Line]:
    """Look whether models and data are where site.yaml says; `site check` reads them too."""
    from quorate.client.models.base_models import find

    lines = []
    for index, model in enumerate(site.config.models):
        lines.append(line(f"models[{index}]", partial(_folder_of, find, model.path, site)))
    for alias, source in site.config.data.items():
        if source.source.partition(":")[0] not in NOT_FILES:
            lines.append(line(f"data.{alias}", partial(_place_of, alias, source.source, site)))
    return lines


def _folder_of(find: Callable[[str, Path], Path], model: str, site: SiteFolder) -> str:
    folder = find(model, site.path)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder}: holds no weights (*.safetensors); get the model's files again.")
    return str(folder)


def _place_of(alias: str, source: str, site: SiteFolder) -> str:
    return str(resolve_local(source, site.path, where=f"{SITE_YAML}, data.{alias}"))


def ledger(site: SiteFolder) -> str:
    """Look at the privacy ledger. Raises: LedgerError, ConfigError, OutputError."""
    from quorate.client.privacy import ledger

    ledger.check_anchor(site)
    verdict = ledger.verify_of(site)
    ledger.check(verdict.findings)
    budgets = len(site.config.policy.privacy_budgets)
    return f"{budgets} privacy budgets; {len(verdict.rows)} rows in the ledger, head {verdict.head}"


def _disk(site: SiteFolder) -> str:
    return check_room({"state": site.state, "anchor of the ledger": site.anchor})
