"""How a site stands: its programs, its base model, its connection, and the runs that wait for a person."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Literal

from quorate.client.health.server_reachability import server_lines
from quorate.client.health.site_conditions import certificates, models_and_data, storage
from quorate.client.health.site_file import SiteFileState, site_file_state
from quorate.client.node.connection_state import read_connection_state, silent
from quorate.client.node.folder import SiteFolder
from quorate.client.policy.approvals import waiting_runs, withdrawn_runs
from quorate.client.process.grpc_server import MODEL, check_health
from quorate.shared.config.config_model import ConfigModel
from quorate.shared.process.looks import Line
from quorate.shared.process.supervised import ProgramState, Status, read_status

_SECONDS = 5.0
"""Longest wait for the server: a person waits for this."""


class ServerContact(ConfigModel):
    """How the SuperNode stands with the server."""

    address: str
    """HOST:PORT."""
    state: Literal["connected", "unreachable", "refused", "silent", "unknown"]
    """`refused`: the server answers and says no; `silent`: the SuperNode has asked nothing for a while."""
    detail: str
    """Kind of failure, or HTTP status."""
    since: datetime | None


class SiteStatus(ConfigModel):
    """What `quorate site status` tells."""

    site: str
    federation: str
    running: bool
    programs: dict[str, ProgramState]
    server: ServerContact
    base_model_loaded: bool
    """Whether the site process holds a base model; it loads one when a run first asks."""
    site_file: SiteFileState | None
    """Whether the site process works by site.yaml as it is now; None where none runs."""
    checks: tuple[Line, ...]
    """Disk, ledger, certificates, models, data and the way to the server: what the next round needs."""
    waiting: tuple[str, ...]
    """Runs that were turned away until a person approves them."""
    withdrawn: tuple[str, ...]
    """Runs that this site has left."""

    @property
    def ok(self) -> bool:
        """Whether every program works, the server is reached, and nothing would make the next round fail."""
        working = bool(self.programs) and not any(each.problem for each in self.programs.values())
        connected = self.running and self.server.state == "connected"
        return working and connected and all(each.ok for each in self.checks)


def site_status(site: SiteFolder) -> SiteStatus:
    """Look at everything. Raises: ConfigError: a file of the site is missing or does not validate."""
    status = read_status(site.supervisor)
    programs = _programs(site, status)
    runs = site.state.is_dir()
    server = _server(site, running=status is not None)
    way = server_lines(site, signed=False, connected=server.state == "connected", seconds=_SECONDS)
    return SiteStatus(
        site=site.connection.site,
        federation=site.connection.federation,
        running=status is not None,
        programs=programs,
        server=server,
        base_model_loaded=status is not None and check_health(site.socket, name=MODEL),
        site_file=site_file_state(site),
        checks=(*storage(site), *certificates(site), *models_and_data(site), *way),
        waiting=tuple(waiting_runs(site.state)) if runs else (),
        withdrawn=tuple(withdrawn_runs(site.state)) if runs else (),
    )


def _programs(site: SiteFolder, status: Status | None) -> dict[str, ProgramState]:
    found = {}
    for name, program in (status.programs if status else {}).items():
        problem = program.stopped
        if problem is not None:
            problem = f"{problem}; see {site.logs / f'{name}.log'}"
        elif name == "site" and not check_health(site.socket):
            problem = "does not answer (it is starting, or stopping)"
        found[name] = program.judged(problem)
    return found


def _server(site: SiteFolder, *, running: bool) -> ServerContact:
    address, found = site.connection.server, read_connection_state(site.contact)
    if not running or found is None:
        return ServerContact(address=address, state="unknown", detail="", since=None)
    if silent(found.last):
        since = datetime.fromtimestamp(found.last, UTC)
        seconds = time.time() - found.last
        return ServerContact(address=address, state="silent", detail=f"for {seconds:.0f} s", since=since)
    since = datetime.fromtimestamp(found.since, UTC)
    return ServerContact(address=address, state=found.state, detail=found.detail, since=since)
