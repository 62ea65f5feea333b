"""What would make the next round fail, seen from the server: disk, certificates, sites that are not there."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from quorate.client.node.enrolment import CLIENT_CRT
from quorate.deploy.server.admitted_keys import read_certificate
from quorate.deploy.server.server_check import revocations_days_left
from quorate.deploy.server.server_paths import ServerPaths
from quorate.shared.errors import NotReady
from quorate.shared.process.looks import LEAST_DAYS, Line, check_days, check_room, line

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
