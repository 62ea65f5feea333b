"""Who takes part in a run, under which name, and in which order its updates are added."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import clock as clocks
import numpy as np
import pytest
from engines import answer_all
from flwr.app import Error
from hypothesis import given
from hypothesis import strategies as st
from refusals import refuses
from tampered import NAMES, Change, described, edited, only, spoiled

from quorate.client.site.site import Site
from quorate.server.exchange import patience
from quorate.server.exchange.exchange import Answers, in_order
from quorate.server.exchange.exclusions import exclusion
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.errors import QuorumNotMet
from quorate.shared.model.lora_model import load_model
from quorate.shared.protocol.messages import RequestHeader, RoundRequest, Update
from quorate.shared.protocol.versions import versions


def test_a_site_that_claims_a_name_twice_is_refused_under_it(play: Any) -> None:
    result, (record,), _, _ = play(only("south", lambda u: edited(u, site="north"), "join"))
    assert set(result.members.nodes) == {"west"} == set(record.cohort)
    why = result.members.refused["north"]
    assert why.code == "refused" and "2 nodes call themselves by this name" in why.reason
    with refuses(QuorumNotMet, "too-few-sites") as raised:
        play(only("south", lambda u: edited(u, site="north"), "join"), federation={"quorum": 2}, out="quorum")
    assert all(said in str(raised.value) for said in ("2 sites", "1 of 3", f"north: {why.reason}"))


@pytest.mark.parametrize(
    ("change", "code", "reason"),
    [
        (lambda u: edited(u, site="../south"), "protocol", "joined under a name"),
        (lambda u: edited(u, description=None), "protocol", "without a description"),
        (lambda u: described(u, start_hash=""), "protocol", "without the hash of its start"),
        (lambda u: edited(u, Adapter({}), error="data"), "data", "could not use its own data"),
        (lambda u: b"oops", "protocol", "not an answer"),
        (lambda u: described(u, label_counts={"mine": 10**400}), "protocol", "not an answer"),
        (lambda u: described(u, label_counts={"mine": 1}), "protocol", "other labels than the run lists"),
        (lambda u: described(u, rows={"train": -1}), "protocol", "not an answer"),
    ],
    ids=["name", "no-description", "no-start", "data", "rubbish", "huge-count", "labels", "negative-rows"],
)
def test_a_site_that_cannot_join_is_named_by_its_node(
    play: Any, change: Change, code: str, reason: str
) -> None:
    result, (record,), _, _ = play(only("south", change, "join"))
    assert set(result.members.nodes) == {"north", "west"} == set(record.cohort)
    assert list(result.members.refused) == ["node 1002"]
    assert result.members.refused["node 1002"].code == code
    assert reason in result.members.refused["node 1002"].reason


def moved(update: Update) -> Update:
    return described(update, start_hash="0" * 64)


def other_files(update: Update) -> Update:
    return described(update, model_files={"model.safetensors": "00"})


@pytest.mark.parametrize("change", [moved, other_files])
def test_a_site_with_another_base_is_refused(play: Any, change: Change) -> None:
    result, (record,), _, run = play(only("north", change, "join"))
    assert set(record.cohort) == {"south", "west"}
    assert result.members.refused["north"].code == "model"
    assert "another base model than most" in result.members.refused["north"].reason
    assert result.members.initial.content_hash == load_model(run.config).initial.content_hash


def test_of_two_bases_that_are_as_common_the_first_name_decides(play: Any) -> None:
    for late_site in ("north", "south"):
        result, *_ = play(only("south", moved, "join"), sites={"north": 5, "south": 5}, out=late_site)
        assert set(result.members.nodes) == {"north"}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (spoiled, "non-finite"),
        (lambda u: edited(u, u.arrays.map(lambda _, array: array + np.float32(1))), "protocol"),
        (lambda u: edited(u, Adapter({})), "protocol"),
    ],
    ids=["nan", "another", "none"],
)
def test_one_copy_of_the_start_is_fetched_and_held_against_what_all_said(
    play: Any, change: Change, code: str
) -> None:
    result, (record,), grid, run = play(only("north", change, "start"))
    fetched = [each.header.site for each in grid.requests if each.header.phase == "start"]
    assert fetched == ["north", "south"], "one site after the other, in the order of their names"
    assert not any(len(each.arrays) for each in grid.updates if each.header.phase == "join")
    assert result.members.refused["north"].code == code and set(record.cohort) == {"south", "west"}
    assert result.members.initial.content_hash == load_model(run.config).initial.content_hash


def test_a_site_that_is_silent_about_its_start_stays_and_the_next_is_asked(
    play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = clocks.installed(monkeypatch)
    federation = {"grace_seconds": 5, "reask_seconds": 10, "timeout_seconds": 3600}
    result, *_ = play(only("north", lambda _: None, "start"), federation=federation)
    assert set(result.members.nodes) == {"north", "south", "west"} and waited.waited < 60


def test_a_site_that_cannot_send_its_start_for_now_stays_and_nobody_is_known_to_be_away(play: Any) -> None:
    for code in ("device-lost", "policy-minutes", "internal"):
        unable = only("north", lambda u, code=code: edited(u, Adapter({}), error=code), "start")
        result, (record,), *_ = play(unable, out=code)
        assert set(record.cohort) == {"north", "south", "west"} == set(record.weights), code
        assert not result.members.refused


def test_a_start_needs_no_grace(play: Any) -> None:
    """Without any grace, and where all sites take their time, the first to answer is waited for."""
    result, *_ = play(federation={"grace_seconds": 0, "reask_seconds": 0, "timeout_seconds": 60})
    assert set(result.members.nodes) == {"north", "south", "west"}


def test_without_any_start_there_is_no_run(play: Any) -> None:
    with refuses(QuorumNotMet, "too-few-sites"):
        play(lambda u: spoiled(u) if u.header.phase == "start" else u)


def answering(name: str) -> Callable[[Update], Update]:
    """An update under another site's name."""
    return lambda update: edited(update, site=name)


def test_a_site_answers_under_the_name_of_its_key_alone(play: Any) -> None:
    """Where the server knows nodes by their keys, whoever says another name is set aside."""
    result, *_ = play(names=NAMES)
    assert result.members.nodes == {"north": 1001, "south": 1002, "west": 1003}
    result, *_ = play(only("south", answering("west"), "join", 0), names=NAMES, out="other")
    assert set(result.members.nodes) == {"north", "west"}
    assert result.members.refused["south"].code == "protocol"
    assert "answered for site 'west'; asked was 'south'" in result.members.refused["south"].reason


def test_admitted_sites_that_are_not_connected_are_named(play: Any) -> None:
    names = {**NAMES, 7: "east"}
    result, *_ = play(names=names, federation={"quorum": 3})
    assert result.members.refused["east"].code == "absent"
    with refuses(QuorumNotMet, "too-few-sites") as caught:
        play(names=names, federation={"quorum": 4}, out="other")
    assert "3 of 4" in str(caught.value) and "east: " in str(caught.value)
    with refuses(QuorumNotMet, "too-few-sites") as caught:  # a node without an admitted key is nobody
        play(names={7: "east"}, out="third")
    assert "0 of 1" in str(caught.value)


def test_a_site_that_was_away_is_asked_again(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two errors of Flower's, then an answer: as if it had answered at once."""
    clocks.installed(monkeypatch)
    asked: Counter[str] = Counter()

    def away_twice(update: Update) -> Update | Error:
        asked[update.header.phase] += 1
        return Error(3, "node is not available") if asked[update.header.phase] < 3 else update

    change = only("south", away_twice)
    single = {"max_stack": 1}  # asked again, it trains without the others
    result, records, *_ = play(change, federation={"reask_seconds": 60, "quorum": 3}, training=single)
    alone, *_ = play(out="alone", training=single)
    assert asked["fit"] == 3 and not records[0].excluded
    assert result.state.adapter.content_hash == alone.state.adapter.content_hash


def test_asking_again_ends_with_its_time(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_FIRST_REASK", 0.05)
    change = only("south", lambda _: Error(3, "node is not available"))
    _, records, *_ = play(change, federation={"reask_seconds": 0.2})
    assert records[0].excluded["south"].code == "unreachable"


@pytest.mark.parametrize("late", [{"north": 3}, {"north": 2, "south": 4}, {"west": 2}])
def test_sums_do_not_depend_on_who_is_first(
    play: Any, late: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks.installed(monkeypatch)
    federation = {"grace_seconds": 60}
    result, *_ = play(late=late, federation=federation)
    punctual, *_ = play(out="punctual", federation=federation)
    assert result.state.adapter.content_hash == punctual.state.adapter.content_hash


@given(st.permutations(list("abcde")), st.sets(st.sampled_from("abcde")))
def test_in_order_keeps_the_order_and_loses_nobody(arrival: list[str], failing: set[str]) -> None:
    answers = Answers({}, quorum=1, timeout=1, grace=0)

    def arriving() -> Iterable[tuple[str, Any]]:
        for site in arrival:
            if site in failing:
                answers.excluded[site] = exclusion("data")
            else:
                yield site, f"update of {site}"

    got = list(in_order("abcde", answers, iter(arriving())))
    assert got == [f"update of {site}" for site in "abcde" if site not in failing]


@pytest.mark.parametrize(
    ("name", "value", "fits"),
    [
        ("quorate", "0.1.7", True),
        ("quorate", "0.2.0", False),
        ("torch", "1.13.0", False),
        ("peft", "", False),
    ],
)
def test_releases_that_do_not_work_together_are_named(play: Any, name: str, value: str, fits: bool) -> None:
    def other(update: Update) -> Update:
        assert update.header.description is not None
        return described(update, versions={**update.header.description.versions, name: value})

    result, *_ = play(only("south", other, "join", 0), names=NAMES)
    assert ("south" in result.members.nodes) is fits
    if not fits:
        assert result.members.refused["south"].code == "version"
        assert f"{name} {value}" in result.members.refused["south"].reason


def test_a_site_refuses_a_server_of_another_release(make_run: Any, make_sites: Any) -> None:
    site = Site(make_sites(north=12))
    config = site.prepare(make_run())
    header = {"run_id": "r", "round": 0, "phase": "join", "site": "north"}
    header |= {"run_config": config.canonical_json(), "config_hash": config.content_hash}
    for theirs, error in ((versions(), None), ({**versions(), "quorate": "9.0"}, "version")):
        asked = RoundRequest(RequestHeader.model_validate({**header, "versions": theirs}))
        assert answer_all(site, [asked])[0].header.error == error
