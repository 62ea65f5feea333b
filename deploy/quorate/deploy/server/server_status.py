"""How the server stands: its programs, its certificates, its sites."""

from __future__ import annotations

from datetime import datetime

from quorate.client.node.enrolment import CLIENT_CRT
from quorate.deploy.provision.node_keys import revocation
from quorate.deploy.server import flower_programs
from quorate.deploy.server.admitted_keys import admitted, read_certificate
from quorate.deploy.server.flower_internals import UNREGISTERED
from quorate.deploy.server.health import problems
from quorate.deploy.server.server_check import revocations_days_left
from quorate.deploy.server.server_conditions import conditions
from quorate.deploy.server.server_paths import SUPERLINK, ServerPaths
from quorate.server.federation.folder import FederationFolder
from quorate.shared.config.config_model import ConfigModel
from quorate.shared.process.looks import Line, days_left
from quorate.shared.process.supervised import ProgramState, read_status


class SiteState(ConfigModel):
    """One site of federation.yaml."""

    admitted: bool
    """Whether its key is known here."""
    node_id: str | None = None
    """Flower's id of its node, once registered."""
    state: str
    """`no key`, `revoked`, `not registered`, `refused` (the key was withdrawn once: the site needs another),
    or in Flower's words: registered (never seen), online, offline; `unknown`: no SuperLink that answers."""
    revoked: datetime | None = None
    """Since when the site is out; None: it is not."""


class ServerStatus(ConfigModel):
    """What `quorate server status` tells."""

    federation: str
    running: bool
    programs: dict[str, ProgramState]
    certificates: dict[str, float]
    """Certificate, or list of revocations -> days that it is still good for."""
    sites: dict[str, SiteState]
    checks: tuple[Line, ...]
    """Disk, certificates, and every site that is not put out: what the next round needs."""

    @property
    def ok(self) -> bool:
        """Whether the server runs, every program of it works, and nothing would make the next round fail."""
        started = self.running and bool(self.programs)
        working = started and not any(program.problem for program in self.programs.values())
        return working and all(each.ok for each in self.checks)


def server_status(folder: FederationFolder) -> ServerStatus:
    """Look at everything. Raises: ConfigError: a file of the federation is missing or damaged."""
    paths, status = ServerPaths(folder), read_status(ServerPaths(folder).supervisor)
    found = problems(paths) if status is not None else {}
    programs = {
        name: program.judged(program.stopped or found.get(name))
        for name, program in (status.programs if status else {}).items()
    }
    answers = SUPERLINK in programs and programs[SUPERLINK].problem is None
    sites = _sites(paths, answers)
    return ServerStatus(
        federation=folder.config.name,
        running=status is not None,
        programs=programs,
        certificates=_certificates(paths),
        sites=sites,
        checks=tuple(conditions(paths, {name: site.state for name, site in sites.items()})),
    )


def _certificates(paths: ServerPaths) -> dict[str, float]:
    files = {"ca": paths.ca, "server": paths.certificate}
    for site in paths.folder.config.sites:
        files[f"site {site}"] = paths.folder.site(site) / CLIENT_CRT
    left = {
        name: days_left(read_certificate(path).not_valid_after_utc)
        for name, path in files.items()
        if path.exists()
    }
    if paths.crl.exists():
        left["list of revocations"] = revocations_days_left(paths)
    return {name: round(days, 1) for name, days in left.items()}


def _sites(paths: ServerPaths, answers: bool) -> dict[str, SiteState]:
    keys = {each.site: each.public_key for each in admitted(paths.folder)}
    nodes = {node.public_key: node for node in flower_programs.nodes(paths)} if answers else {}
    sites = {}
    for site in paths.folder.config.sites:
        key = keys.get(site)
        node = nodes.get(key) if key else None
        if node is not None:
            state = "refused" if node.state == UNREGISTERED else node.state
            sites[site] = SiteState(admitted=True, node_id=str(node.id), state=state)
        elif (out := revocation(paths.folder, site)) is not None:
            sites[site] = SiteState(admitted=False, state="revoked", revoked=out.time)
        elif key is None:
            sites[site] = SiteState(admitted=False, state="no key")
        else:
            sites[site] = SiteState(admitted=True, state="not registered" if answers else "unknown")
    return sites
