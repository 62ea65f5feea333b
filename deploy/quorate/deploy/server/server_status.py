"""How the server stands: its programs, certificates and sites, and what would make the next round fail."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from functools import partial
from pathlib import Path

from quorate.client.node.enrolment import CLIENT_CRT
from quorate.deploy.provision.node_keys import revocation
from quorate.deploy.server import flower_programs
from quorate.deploy.server.admitted_keys import admitted, read_certificate
from quorate.deploy.server.flower_internals import UNREGISTERED
from quorate.deploy.server.health import problems
from quorate.deploy.server.server_check import revocations_days_left
from quorate.deploy.server.server_paths import SUPERLINK, ServerPaths
from quorate.server.federation.folder import FederationFolder
from quorate.shared.config.config_model import ConfigModel
from quorate.shared.errors import NotReady
from quorate.shared.process.looks import LEAST_DAYS, Line, check_days, check_room, days_left, line
from quorate.shared.process.supervised import ProgramState, read_status

_MISSING = {
    "no key": "no node key of it is admitted; once its people have sent node.pub: "
    "`quorate server admit {site} node.pub`",
    "not registered": "the running server has not taken its node key over; server.log says why",
    "refused": "Flower takes its node key no more; have it give `quorate site enrol --renew`, then "
    "`quorate server admit {site} node.pub --renew`",
    "registered": "has never connected; at the site: `quorate site start`, and `quorate site status` says "
    "why not",
    "offline": "is not connected; at the site: `quorate site status`",
    "unknown": "cannot be known: the SuperLink does not answer",
}
"""State of a site that the next round would miss -> why, and what to do."""


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


def conditions(paths: ServerPaths, sites: Mapping[str, str]) -> list[Line]:
    """Look at all of it.

    Args:
        sites: site -> its state, as `quorate server status` names it.
    """
    settings = paths.folder.config.server
    lines = [line("disk", partial(_disk, paths))]
    lines.append(line("ca.crt", partial(_certificate, paths.ca, "provision a new federation before that")))
    lines.append(
        line("server.crt", partial(_certificate, paths.certificate, "give `quorate certificates renew`"))
    )
    if settings.mutual_tls:
        lines.append(line("ca.crl", partial(_revocations, paths)))
    for site, state in sites.items():
        if state != "revoked":
            lines.append(line(f"site {site}", partial(_site, paths, site, state)))
    return lines


def _disk(paths: ServerPaths) -> str:
    # Checkpoints, adapters and reports of runs, the SuperLink's database and the logs lie in `state`.
    return check_room({"state": paths.folder.state, "runs": paths.folder.runs, "ca": paths.folder.ca})


def _certificate(path: Path, remedy: str) -> str:
    found = read_certificate(path)
    return check_days(str(path), found.not_valid_before_utc, found.not_valid_after_utc, remedy)


def _revocations(paths: ServerPaths) -> str:
    if (left := revocations_days_left(paths)) < LEAST_DAYS:  # nginx turns every site away after that
        raise NotReady(f"{paths.crl}: good for {left:.1f} days more; give `quorate provision` again.")
    return f"good for {left:.0f} days"


def _site(paths: ServerPaths, site: str, state: str) -> str:
    if state in _MISSING:
        raise NotReady(f"{state}: {_MISSING[state].format(site=site)}.")
    if not paths.folder.config.server.mutual_tls:
        return state
    path = paths.folder.site(site) / CLIENT_CRT
    sign = f"`quorate certificates sign {site} client.csr`"
    if not path.exists():
        raise NotReady(f"{state}, but no client certificate was signed for it; give {sign}.")
    return f"{state}, its client certificate is {_certificate(path, f'give {sign} --renew, and send {path}')}"
