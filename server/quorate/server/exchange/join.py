"""Before round 1: which sites take part, and do they hold the same base model?"""

from __future__ import annotations

import json
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from quorate.server.exchange.exchange import Answers, Check
from quorate.server.exchange.exclusions import exclusion
from quorate.server.exchange.flower_messages import POLL_SECONDS
from quorate.server.exchange.patience import TELL_SECONDS
from quorate.server.exchange.presence import Presence
from quorate.server.rounds.run import Run
from quorate.server.rounds.update_checks import MOST_ROWS
from quorate.server.tracking.events import PhaseBegan, Refused, Waiting
from quorate.server.tracking.records import Exclusion
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.config.config_model import NAME
from quorate.shared.config.privacy_config import SitePrivacy
from quorate.shared.errors import ConfigError, NonFiniteUpdate, ProtocolError, QuorumNotMet
from quorate.shared.protocol.messages import RequestHeader, RoundRequest, SiteDescription, Split, Update
from quorate.shared.protocol.phases import Phase
from quorate.shared.protocol.versions import check_versions, versions

log = logging.getLogger(__name__)

_MAY_COME = ("timeout", "unreachable", "absent")
"""Codes of sites that did not join for want of an answer, and may still."""
_WRONG = (ProtocolError.code, NonFiniteUpdate.code, ConfigError.code)
"""Codes of an answer that came and is not what was asked for."""
APPROVAL, APPROVAL_SECONDS = "policy-approval", 15.0
"""Code of a site whose people must approve the run first, and how often it is asked whether they have [s]."""


@dataclass
class Members:
    """The sites of a run.

    Args:
        nodes: site -> Flower node id.
        sites: site -> what it said of itself.
        initial: the adapter's seeded start, the same at every site.
        refused: sites that cannot take part, and why.
        identity: what they have in common.
        start_hash: content hash of that start.
        presence: which of them are known to be away.
        late: those that may still join.
        pace: seconds that the longest training or evaluation took so far, of those that were answered.
    """

    nodes: dict[str, int]
    sites: dict[str, SiteDescription]
    initial: Adapter
    refused: dict[str, Exclusion] = field(default_factory=dict)
    identity: str = ""
    start_hash: str = ""
    presence: Presence = field(default_factory=Presence)
    late: dict[int, str] = field(default_factory=dict)
    pace: float = 0.0

    @property
    def by_node(self) -> dict[int, str]:
        """Flower node id -> site."""
        return {node: site for site, node in self.nodes.items()}

    def set_aside(self, site: str, why: Exclusion) -> None:
        """Let a site that had joined take no part."""
        self.refused[site] = why
        del self.nodes[site], self.sites[site]


def request(
    run: Run, round: int, phase: Phase, site: str, arrays: Adapter | None = None, split: Split | None = None
) -> RoundRequest:
    """Return one request of this run."""
    header = RequestHeader(
        run_id=run.run_id,
        round=round,
        phase=phase,
        site=site,
        split=split,
        versions=versions() if phase == "join" else {},
        run_config=run.config.canonical_json(),
        config_hash=run.config.content_hash,
    )
    return RoundRequest(header, arrays)


def answers_of(
    run: Run,
    sites: Mapping[int, str],
    presence: Presence,
    *,
    quorum: int | None = None,
    expected: float = 0.0,
) -> Answers:
    """Return an empty account for one exchange.

    Args:
        run: says how long is waited.
        sites: node id -> site.
        presence: who is known to be away.
        quorum: good answers without which the run does not go on; None for an exchange that the run can do
            without.
        expected: seconds that the work takes anyway.
    """
    federation = run.config.federation
    return Answers(
        sites,
        min(federation.quorum, len(sites)) if quorum is None else quorum,
        max(federation.timeout_seconds, 2 * expected),
        federation.grace_seconds,
        federation.reask_seconds,
        optional=quorum is None,
        expected=expected,
        presence=presence,
        on_wait=lambda sites: run.tell(Waiting(sites=sites)),
    )


def join(grid: Grid, run: Run, names: Mapping[int, str] | None = None) -> Members:
    """Ask every node to describe itself, and keep those that hold the same base and the same start.

    Args:
        names: node id -> site, as registered with the node's key; None where sites name themselves.
    Raises: QuorumNotMet: fewer than federation.quorum are left, with each one's reason.
    """
    run.tell(PhaseBegan(round=0, name="join"))
    federation, presence = run.config.federation, Presence()
    known = {node: f"node {node}" for node in grid.get_node_ids()} if names is None else dict(names)
    online = set(known) if names is None else _wait_for(grid, run, names)
    asked = {node: request(run, 0, "join", names[node] if names else "") for node in sorted(online)}
    answers = answers_of(run, known, presence, quorum=federation.quorum)
    # Who is there may be loading the base model. With client-level privacy nobody joins later.
    answers.grace = answers.timeout if run.config.private_clients else answers.grace + answers.reask
    answers.waiting_for_people = APPROVAL
    back = {name: node for node, name in known.items()}
    check = join_check(run)
    replied = [(back[name], update) for name, update in answers.ask(grid, asked, check)]
    for name, update in _once_approved(grid, run, answers, asked, check):
        replied.append((back[name], update))
    members = _agreeing(replied)
    members.presence = presence
    members.refused.update(answers.excluded)
    if len(members.nodes) >= federation.quorum:
        members.initial = _fetch_start(grid, run, members)
    members.refused.update({known[node]: exclusion("absent") for node in sorted(known.keys() - online)})
    members.late = {
        back[name]: name for name, why in members.refused.items() if name in back and why.code in _MAY_COME
    }
    presence.missed(dict.fromkeys(known.keys() - online, time.monotonic()), {}, listed=False)
    if members.refused:
        run.tell(Refused(sites=members.refused))
    if len(members.nodes) < federation.quorum:
        reasons = "; ".join(f"{site}: {e.reason}" for site, e in sorted(members.refused.items()))
        raise QuorumNotMet(
            f"the run needs {federation.quorum} sites, {len(members.nodes)} of {len(known)} can take part"
            f"{f' ({reasons})' if reasons else ''}; mend those sites or lower federation.quorum.",
            kind="too-few-sites",
        )
    return members


def _once_approved(
    grid: Grid, run: Run, answers: Answers, asked: Mapping[int, RoundRequest], check: Check[Update]
) -> Iterator[tuple[str, Update]]:
    """Ask sites that wait for their people's word until they have it; yields (site, update) as they join.

    Whoever has none after federation.approval_seconds stays in the account as excluded.
    """
    until, said = time.monotonic() + run.config.federation.approval_seconds, ""
    while without := [node for node in asked if _unapproved(answers, node)]:
        if (left := until - time.monotonic()) <= 0:
            return
        names = ", ".join(answers.sites[node] for node in without)
        if names != said:
            word = (
                f"waiting for approval at {names}: their people must give `quorate site approve {run.run_id}`"
            )
            run.tell(PhaseBegan(round=0, name=word))
            said = names
        time.sleep(min(APPROVAL_SECONDS, left))
        again = answers_of(run, answers.sites, answers.presence)
        left = max(until - time.monotonic(), APPROVAL_SECONDS)
        again.timeout = min(again.timeout, left, again.grace + again.reask)
        for node in without:
            del answers.excluded[answers.sites[node]]
        yield from again.ask(grid, {node: asked[node] for node in without}, check)
        answers.excluded.update(again.excluded)


def _unapproved(answers: Answers, node: int) -> bool:
    why = answers.excluded.get(answers.sites[node])
    return why is not None and why.code == APPROVAL


def _wait_for(grid: Grid, run: Run, names: Mapping[int, str]) -> set[int]:
    """Return the admitted nodes that are connected, once all are, or enough for long enough."""
    federation, started = run.config.federation, time.monotonic()
    enough_since: float | None = None
    last_word = started
    while True:
        online, now = set(grid.get_node_ids()) & set(names), time.monotonic()
        if len(online) >= federation.quorum:
            enough_since = enough_since or now
        patient = enough_since is None or now - enough_since < federation.grace_seconds
        if len(online) == len(names) or not patient or now - started >= federation.reask_seconds:
            return online
        if now - last_word >= TELL_SECONDS:
            last_word = now
            away = {names[node]: now - started for node in sorted(names.keys() - online)}
            run.tell(Waiting(sites=away))
        time.sleep(POLL_SECONDS)


def join_check(run: Run) -> Check[Update]:
    """Return what an answer to `join` must pass."""
    private = isinstance(run.config.privacy, SitePrivacy)
    labels = {} if private else run.config.task.label_counts(())

    def check(_request: RoundRequest, update: Update) -> Update:
        _check(update, labels.keys(), private)
        return update

    return check


def _check(update: Update, labels: Set[str], private: bool) -> None:
    description = update.header.description
    if description is None:
        raise ProtocolError("joined without a description of itself.")
    if not description.start_hash:
        raise ProtocolError("joined without the hash of its start.")
    if not re.fullmatch(NAME, update.header.site):
        raise ProtocolError("joined under a name that is not letters, digits, dots, dashes and underscores.")
    if description.label_counts.keys() != labels:
        raise ProtocolError("counted other labels than the run lists.")
    if private and description.privacy is None:
        raise ProtocolError("does not say what it does for the privacy that the run asks for.")
    if description.privacy is not None and not private:
        raise ProtocolError("claims a privacy that the run does not ask for.")
    if any(count > MOST_ROWS for count in description.rows.values()):
        raise ProtocolError(f"claims more rows than a site can have ({MOST_ROWS:,}).")
    check_versions(description.versions)


def _agreeing(replied: list[tuple[int, Update]]) -> Members:
    """Keep the sites whose base model and seeded start are the most common ones."""
    members = Members({}, {}, Adapter({}))
    replied = sorted(replied, key=lambda each: (each[1].header.site, each[0]))  # who came first is chance
    keys = {node: identity(update) for node, update in replied}
    common = Counter(keys.values()).most_common(1)[0][0] if keys else None
    names = Counter(update.header.site for _, update in replied)
    for node, update in replied:
        site, description = update.header.site, update.header.description
        assert description is not None  # _check
        if names[site] > 1:  # nothing says which of them is who it claims to be
            members.refused[site] = exclusion(
                "refused", f"{names[site]} nodes call themselves by this name; give each site its own"
            )
        elif keys[node] != common:
            members.refused[site] = exclusion("model", "holds another base model than most sites")
        else:
            members.nodes[site], members.sites[site] = node, description
            members.identity, members.start_hash = keys[node], description.start_hash
    return members


def _fetch_start(grid: Grid, run: Run, members: Members) -> Adapter:
    """Have one site send the seeded start that all say they have.

    One copy comes over the wire and is held, whatever the number of sites. One after the other is asked as
    long as what comes is wrong, and who sent that is set aside. Where one is silent, or cannot for now, all
    are asked at once, and the first to answer will do; the others stay what they are.

    Returns: the start; the empty one of `members` where nobody is left.
    Raises: QuorumNotMet: nobody sent it within federation.timeout_seconds.
    """
    federation = run.config.federation
    patience = min(federation.timeout_seconds, max(1.0, federation.grace_seconds + federation.reask_seconds))
    for site, node in sorted(members.nodes.items()):
        start = _take_start(grid, run, members, {node: site}, patience)
        if start is not None:
            return start
        if site in members.nodes:
            break
    if not members.nodes:  # each sent a wrong one; `join` says who and why
        return members.initial
    start = _take_start(grid, run, members, members.by_node, federation.timeout_seconds)
    if start is None:
        raise QuorumNotMet(
            f"none of {', '.join(sorted(members.nodes))} sent the adapter's start, which they say they have; "
            "see their logs, then start the run again."
        )
    return start


def _take_start(
    grid: Grid, run: Run, members: Members, asked: Mapping[int, str], seconds: float
) -> Adapter | None:
    """Return the first right start that these sites send, if any; set those aside whose is wrong."""

    def check(_request: RoundRequest, update: Update) -> Adapter:
        update.arrays.check_finite()
        if update.arrays.content_hash != members.start_hash:
            raise ProtocolError("sent another start than it said it has.")
        return update.arrays

    answers = answers_of(run, asked, Presence(), quorum=1)  # who is silent here is not known to be away
    answers.timeout = seconds
    requests = {node: request(run, 0, "start", site) for node, site in asked.items()}
    for _, start in answers.ask(grid, requests, check):
        return start
    for site, why in answers.excluded.items():
        if why.code in _WRONG:
            members.set_aside(site, why)
    return None


def identity(update: Update) -> str:
    """Return what sites of one run must have in common: the base model's files, and the adapter's start."""
    description = update.header.description
    assert description is not None  # join_check
    return json.dumps([description.model_files, description.start_hash], sort_keys=True)


def warn_of_changes(before: Mapping[str, SiteDescription], now: Mapping[str, SiteDescription]) -> None:
    """Name the sites whose rows are not those that the run began with.

    Sites may come and go, but the run no longer ends where it would have ended, and rows that were trained on
    may now be tested on.
    """
    changed = [
        site
        for site in sorted(before.keys() | now.keys())
        if site not in before
        or site not in now
        or (before[site].rows, before[site].label_counts) != (now[site].rows, now[site].label_counts)
    ]
    if changed:
        log.warning(
            "the rows of %s are not those of the rounds before (other data or another sites file): figures "
            "before and after do not compare, and a test may hold rows that were trained on",
            ", ".join(changed),
        )
