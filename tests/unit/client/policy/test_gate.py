"""The site's policy: what is outside it is refused by a code, before anything is read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from refusals import refuses
from site_folder import RUN_ID, request, sha256_of

from quorate.client.policy.approvals import approve, note_waiting, waiting_runs
from quorate.client.policy.gate import Gate, check_rows
from quorate.client.policy.site_config import SiteConfig
from quorate.client.site.request import Request, failed
from quorate.server.exchange.exclusions import REASONS
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.errors import ConfigError, ProtocolError, RequestRefused
from quorate.shared.protocol.messages import RoundRequest, Update


class Inner:
    """Counts what gets through; a request that is refused must not get here, where rows would be read."""

    def __init__(self) -> None:
        self.seen = 0

    def handle(self, request: Request) -> Update:
        self.seen += 1
        return Update.reply(request)


def ask(gate: Gate, message: RoundRequest) -> Update:
    """Answer a message as the first link of a site's chain does."""
    try:
        return gate.handle(Request.read(message))
    except ProtocolError as error:
        return failed(message, error)


@pytest.fixture
def pinned(tiny_bert: Path, make_run: Any) -> Any:
    """Build runs that name their model's hash, and a path that is nowhere: the site's own is used."""

    def make(**sections: Any) -> Any:
        model = {
            "model_name_or_path": "/nowhere",
            "sha256": sha256_of(tiny_bert),
            **sections.pop("model", {}),
        }
        return make_run(model=model, **sections)

    return make


@pytest.fixture
def site(tiny_bert: Path) -> Any:
    def make(**policy: Any) -> SiteConfig:
        return SiteConfig.model_validate(
            {
                "data": {"notes": {"source": "nowhere.csv"}, "scans": {"source": "nowhere.csv"}},
                "models": [{"path": "elsewhere", "sha256": sha256_of(tiny_bert)}],
                "policy": policy,
            }
        )

    return make


CASES: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({"tasks": ["causal_lm"]}, {}, "policy-task", "policy.tasks allows causal_lm"),
    ({}, {"data": "letters"}, "policy-data", "data allows notes, scans, the run asks for data letters"),
    ({"data": ["scans"]}, {}, "policy-data", "policy.data allows scans, the run asks for data notes"),
    ({}, {"model": {"sha256": None}}, "policy-model", "set model.sha256 in the run file"),
    ({}, {"model": {"sha256": "0" * 64}}, "policy-model", "add its folder and sha256 to models"),
    ({"max_rank": 3}, {}, "policy-rank", "policy.max_rank is 3, the run asks for rank 4; raise"),
    (
        {"aggregation": ["fedavg", "ffa"]},
        {"aggregation": {"name": "fedex"}},
        "policy-aggregation",
        "policy.aggregation allows fedavg, ffa, the run asks for rule fedex; add it",
    ),
    (
        {"modules_to_save": ["bert.pooler.dense"]},
        {"adapter": {"modules_to_save": ["bert.pooler.dense", "dense"]}},
        "policy-modules-to-save",
        "policy.modules_to_save allows bert.pooler.dense, the run asks for module dense; add it",
    ),
    (
        {},
        {"adapter": {"modules_to_save": ["encoder"]}},
        "policy-modules-to-save",
        "policy.modules_to_save allows nothing, the run asks for module encoder; add it",
    ),
    (
        {"max_head_units": 15},
        {"adapter": {"head": {"hidden_sizes": [8, 8]}}},
        "policy-head",
        "policy.max_head_units is 15, the run asks for a head of 16 hidden units; raise",
    ),
    (
        {"max_head_units": 0},
        {"adapter": {"head": {"hidden_sizes": [1]}}},
        "policy-head",
        "lower adapter.head",
    ),
    ({"approve_each_run": True}, {}, "policy-approval", f"quorate site approve {RUN_ID}"),
]


@pytest.mark.parametrize(("policy", "sections", "code", "said"), CASES)
def test_a_refusal_logs_rule_value_and_remedy_and_sends_a_code(
    policy: Any, sections: Any, code: str, said: str, site: Any, pinned: Any, tmp_path: Path, caplog: Any
) -> None:
    inner = Inner()
    gate = Gate(site(**policy), tmp_path, inner)
    for phase, round in (("join", 0), ("fit", 1), ("evaluate", 1)):
        caplog.clear()
        update = ask(gate, request(pinned(**sections), phase, round))
        assert update.header.error == code and inner.seen == 0
        assert said in caplog.text and not any(record.exc_info for record in caplog.records)
        assert said not in update.header.model_dump_json()
    assert code in REASONS


def test_what_is_allowed_gets_through(site: Any, pinned: Any, tmp_path: Path) -> None:
    inner = Inner()
    policy = site(tasks=["sequence_classification"], data=["notes"], max_rank=4)
    update = ask(Gate(policy, tmp_path, inner), request(pinned()))
    assert (update.header.error, inner.seen) == (None, 1)


def test_what_may_be_trained_whole_gets_through(site: Any, pinned: Any, tmp_path: Path) -> None:
    inner = Inner()
    policy = site(modules_to_save=["pooler.dense"], max_head_units=16)
    whole = {"modules_to_save": ["pooler.dense"], "head": {"hidden_sizes": [8, 8]}}
    update = ask(Gate(policy, tmp_path, inner), request(pinned(adapter=whole)))
    assert (update.header.error, inner.seen) == (None, 1)


def test_too_few_rows(site: Any) -> None:
    check_rows(site(min_rows=10), "notes", 10)
    with pytest.raises(RequestRefused) as caught:
        check_rows(site(min_rows=10), "notes", 9)
    facts = ("policy.min_rows is 10", "data.notes", " 9 ")
    assert caught.value.code == "policy-rows" and all(fact in str(caught.value) for fact in facts)


def test_a_person_approves_one_run_with_one_configuration(site: Any, pinned: Any, tmp_path: Path) -> None:
    inner = Inner()
    gate = Gate(site(approve_each_run=True), tmp_path, inner)
    for run_id in (RUN_ID, f"../waiting/{RUN_ID}"):
        with refuses(ConfigError, "run-not-waiting") as caught:
            approve(tmp_path, run_id)
        assert repr(run_id) in str(caught.value)
    ask(gate, request(pinned(), "join", 0))
    assert waiting_runs(tmp_path) == [RUN_ID] and inner.seen == 0
    assert approve(tmp_path, RUN_ID).read_text() == pinned().canonical_json()
    assert waiting_runs(tmp_path) == []
    ask(gate, request(pinned(), "join", 0))
    ask(gate, request(pinned()))
    assert inner.seen == 2
    update = ask(gate, request(pinned(seed=4)))
    assert (update.header.error, inner.seen) == ("other-config", 2), "approved was another configuration"
    for path in (tmp_path / "approved").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


def test_what_a_person_reads_is_what_a_person_approves(site: Any, pinned: Any, tmp_path: Path) -> None:
    inner = Inner()
    gate = Gate(site(approve_each_run=True), tmp_path, inner)
    ask(gate, request(pinned(), "join", 0))  # read by a person, and then, before the word is given:
    update = ask(gate, request(pinned(seed=4), "join", 0))
    assert update.header.error == "other-config"
    assert approve(tmp_path, RUN_ID).read_text() == pinned().canonical_json()


def test_runs_that_ask_cannot_push_out_one_that_waits(tmp_path: Path) -> None:
    for number in range(100):
        note_waiting(tmp_path, f"{number:016x}", "{}")
    with refuses(RequestRefused, "too-many-waiting") as caught:
        note_waiting(tmp_path, RUN_ID, "{}")
    assert "100 " in str(caught.value) and str(tmp_path / "waiting") in str(caught.value)
    approve(tmp_path, f"{7:016x}")
    note_waiting(tmp_path, RUN_ID, "{}")
    left = {path.stem for path in (tmp_path / "waiting").iterdir()}
    assert left == {f"{number:016x}" for number in range(100) if number != 7} | {RUN_ID}


def test_a_configuration_that_nobody_could_read_is_not_kept(site: Any, pinned: Any, tmp_path: Path) -> None:
    asked = request(pinned())
    long = asked.header.model_copy(update={"run_config": asked.header.run_config + " " * 2**20})
    with refuses(ProtocolError, "config-too-long"):
        Request.read(RoundRequest(long, asked.arrays))


def test_messages_that_are_wrong_in_themselves(
    site: Any, pinned: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inner, run = Inner(), pinned()
    gate = Gate(site(), tmp_path, inner)
    secret = "patient-4711"
    infinite = Adapter({"a": np.array([np.inf], np.float32)})
    cases = [
        (request(run, run_config='{"name": "' + secret + '"}'), "protocol"),
        (request(run, run_config=run.canonical_json() + " "), "protocol"),
        (request(run, config_hash="0" * 64), "protocol"),
        (request(run, run_id="../../etc/passwd"), "protocol"),
        (request(run, round=0), "protocol"),
        (request(run, round=3), "protocol"),
        (request(run, arrays=infinite), "non-finite"),
        (request(run, "evaluate", arrays=infinite, split="test"), "non-finite"),
    ]
    with caplog.at_level(logging.DEBUG):
        for asked, code in cases:
            update = ask(gate, asked)
            assert update.header.error == code
    assert inner.seen == 0 and secret not in caplog.text and "Traceback" not in caplog.text


def test_policies_that_name_nothing_are_refused_when_they_are_read(site: Any) -> None:
    for place, wrong, facts in (
        (("policy", "tasks"), {"tasks": ["translation"]}, ("translation", "sequence_classification")),
        ((), {"data": ["letters"]}, ("policy.data", "letters", "notes")),
    ):
        with pytest.raises(ValidationError) as caught:
            site(**wrong)
        (found,) = caught.value.errors()
        assert (found["loc"], found["type"]) == (place, "value_error")
        assert all(fact in found["msg"] for fact in facts)
