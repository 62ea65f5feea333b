"""Sites whose people must approve a run first: the run waits for their word, up to its limit."""

from __future__ import annotations

import time
from typing import Any

import pytest
from tampered import NAMES, Change, edited

from quorate.server.exchange import join
from quorate.server.exchange.exclusions import REASONS
from quorate.server.tracking.events import EVENTS_FILE, EventsReader, PhaseBegan
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.errors import QuorumNotMet
from quorate.shared.protocol.messages import Update

APPROVAL = "policy-approval"


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "APPROVAL_SECONDS", 0.05)


def approving(after: dict[str, float]) -> Change:
    """Sites -> questions that each turns away before a person approves the run."""
    left = dict(after)

    def change(update: Update) -> Update:
        site = update.header.site
        if update.header.phase != "join" or left.get(site, 0) <= 0:
            return update
        left[site] -= 1
        return edited(update, Adapter({}), error=APPROVAL, description=None)

    return change


def test_a_run_waits_until_every_site_was_approved(play: Any) -> None:
    change = approving({"north": 3, "west": 5})
    result, (record,), grid, _ = play(change, names=NAMES, federation={"quorum": 3, "approval_seconds": 600})
    assert set(result.members.nodes) == {"north", "south", "west"} == set(record.cohort)
    assert result.members.refused == {}
    joins = [each.header.site for each in grid.requests if each.header.phase == "join"]
    assert {site: joins.count(site) for site in NAMES.values()} == {"north": 4, "south": 1, "west": 6}
    punctual, *_ = play(names=NAMES, out="punctual")
    assert result.state.adapter.content_hash == punctual.state.adapter.content_hash


def test_who_was_not_approved_in_time_is_left_out(play: Any) -> None:
    never = approving({"north": float("inf")})
    federation = {"quorum": 2, "approval_seconds": 0.3}
    began = time.monotonic()
    result, (record,), *_ = play(never, names=NAMES, federation=federation)
    assert time.monotonic() - began >= 0.3
    assert set(record.cohort) == {"south", "west"}
    assert result.members.refused["north"].code == APPROVAL
    with pytest.raises(QuorumNotMet) as raised:
        play(never, names=NAMES, federation={**federation, "quorum": 3}, out="more")
    assert raised.value.exit_code == 3


def test_without_a_time_nobody_is_waited_for(play: Any) -> None:
    change = approving({"north": 1})
    result, _, grid, _ = play(change, names=NAMES, federation={"approval_seconds": 0})
    assert result.members.refused["north"].code == APPROVAL
    assert sum(each.header.phase == "join" for each in grid.requests) == 3


def test_the_person_at_the_coordinator_reads_whose_word_is_missing(
    play: Any,
) -> None:
    _, _, _, run = play(approving({"north": 2, "west": 4}), names=NAMES)
    told = EventsReader(run.output_dir / EVENTS_FILE).read()
    waiting = [each.name for each in told if isinstance(each, PhaseBegan) and "approval" in each.name]
    assert len(waiting) == 2  # once for each set of sites, not at every question
    assert "north, west" in waiting[0] and "west" in waiting[1] and "north" not in waiting[1]
    assert all(f"quorate site approve {run.run_id}" in each for each in waiting)
    assert APPROVAL in REASONS
