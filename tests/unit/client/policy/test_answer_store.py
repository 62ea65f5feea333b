"""Stored answers: the same request gives the same bytes and trains nothing, and no round is trained twice."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import refuses
from site_folder import RUN_ID, SITE, request

from quorate.client.policy import answer_store
from quorate.client.policy.answer_store import KEEP_ROUNDS, AnswerStore
from quorate.client.site.engine import OneAtATime
from quorate.client.site.request import Request
from quorate.client.site.site import Site
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.errors import OutputError
from quorate.shared.protocol.messages import RoundRequest, Update


class Counted:
    """A real site, the optimiser steps it took, and the store before it."""

    def __init__(self, path: Path, rows: Any) -> None:
        self.steps = 0
        self.path = path
        self._site = OneAtATime(Site(rows, on_step=self._step))
        self.store = AnswerStore(path, self._site)

    def _step(self, _event: object) -> None:
        self.steps += 1

    def reopen(self) -> None:
        """As a new process would."""
        self.store.close()
        self.store = AnswerStore(self.path, self._site)

    def ask(self, asked: RoundRequest) -> Update:
        return self.store.handle(Request.decode(asked.encoded))


@pytest.fixture
def site(tmp_path: Path, make_sites: Any) -> Any:
    counted = Counted(tmp_path / "answers.db", make_sites(**{SITE: 20}))
    yield counted
    counted.store.close()


@pytest.fixture
def run(make_run: Any) -> Any:
    return make_run(federation={"rounds": 9})


def start(value: float) -> Adapter:
    """Another start of the adapter: one of its arrays, filled with `value`."""
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight"
    return Adapter({name: np.full((32, 4), value, np.float32)})


def test_the_same_request_gives_the_same_bytes_and_trains_nothing(site: Any, run: Any) -> None:
    first = site.ask(request(run))
    assert first.header.error is None and site.steps == 3 == first.header.num_steps
    assert site.ask(request(run)).encoded == first.encoded
    site.reopen()
    again = site.ask(request(run))
    assert again.encoded == first.encoded and again.arrays.content_hash == first.arrays.content_hash
    assert site.steps == 3
    evaluation = request(run, "evaluate", split="test")
    assert site.ask(evaluation).encoded == site.ask(evaluation).encoded
    assert site.ask(request(run, "evaluate", split="validation")).header.num_examples == 9, "another split"


def test_training_alone_is_done_once(site: Any, make_run: Any) -> None:
    run = make_run(evaluation={"references": ["local_only"]})
    first = site.ask(request(run, "alone", 0))
    assert first.header.error is None and site.steps == 6, "three steps in each of two rounds"
    site.reopen()
    assert site.ask(request(run, "alone", 0)).encoded == first.encoded and site.steps == 6
    assert site.ask(request(run, "fit", 1)).header.error is None, "it is no round of the run"


def test_a_round_is_trained_from_one_start_alone(site: Any, run: Any) -> None:
    first = site.ask(request(run))
    other = site.ask(request(run, arrays=start(0.1)))
    assert (other.header.error, site.steps) == ("conflict", 3)
    assert len(other.arrays) == 0 and other.header.num_examples == 0, "a refusal carries nothing"
    assert site.ask(request(run)).encoded == first.encoded, "a conflict leaves the stored answer alone"
    assert site.ask(request(run, arrays=start(0.1), run_id="f" * 16)).header.error is None, "another run"


def test_older_rounds_are_not_trained_any_more(site: Any, run: Any) -> None:
    assert site.ask(request(run, round=2)).header.error is None
    assert site.ask(request(run, round=1)).header.error == "outdated"
    assert site.steps == 3
    assert site.ask(request(run, "evaluate", round=1, split="test")).header.error is None, "the best round"


def test_a_run_keeps_its_configuration(site: Any, run: Any, make_run: Any) -> None:
    site.ask(request(run, "join", 0))
    changed = make_run(federation={"rounds": 9}, training={"learning_rate": 0.5})
    for phase, round in (("join", 0), ("fit", 1)):
        assert site.ask(request(changed, phase, round)).header.error == "other-config"
    assert site.steps == 0
    assert site.ask(request(run)).header.error is None, "the first configuration goes on"


def test_a_join_is_answered_afresh_and_an_error_again(site: Any, run: Any) -> None:
    assert site.ask(request(run, "join", 0)).header.description is not None
    bad = request(run, arrays=Adapter({"elsewhere": np.zeros(2, np.float32)}))
    assert site.ask(bad).header.error == "adapter"
    assert site.ask(request(run)).header.error is None, "what failed was not trained"
    with sqlite3.connect(site.path) as db:
        assert db.execute("SELECT phase, round FROM answers").fetchall() == [("fit", 1)]


def test_old_rounds_let_go_of_their_arrays(site: Any, run: Any) -> None:
    for round in range(1, KEEP_ROUNDS + 3):
        site.ask(request(run, round=round))
    steps = site.steps
    newest = KEEP_ROUNDS + 2
    for round in range(1, newest + 1):
        error = site.ask(request(run, round=round)).header.error
        assert error == (None if round > newest - KEEP_ROUNDS else "outdated")
    assert site.steps == steps
    with sqlite3.connect(site.path) as db:
        kept = "SELECT count(*) FROM answers WHERE message IS NOT NULL"
        assert db.execute(kept).fetchone() == (KEEP_ROUNDS,)
        db.execute("UPDATE runs SET heard_at = 0")
    site.ask(request(run, run_id="f" * 16))
    with sqlite3.connect(site.path) as db:
        assert db.execute(kept).fetchone() == (1,), "a run that is not heard of any more"
    assert site.ask(request(run, round=newest, arrays=start(1))).header.error == "conflict"


def test_what_lies_here_is_limited(site: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_store, "KEEP_RUNS", 3)
    monkeypatch.setattr(answer_store, "KEEP_EVALUATIONS", 2)
    ids = [f"{number:016x}" for number in range(5)]
    for run_id in ids:
        site.ask(request(run, run_id=run_id))
        for value in (0.1, 0.2, 0.3):
            asked = request(run, "evaluate", split="validation", arrays=start(value), run_id=run_id)
            assert site.ask(asked).header.error is None
    with sqlite3.connect(site.path) as db:
        fits = "SELECT run_id FROM answers WHERE phase = 'fit' AND message IS NOT NULL ORDER BY run_id"
        assert [run_id for (run_id,) in db.execute(fits)] == ids[2:]
        evaluations = "SELECT run_id, count(*) FROM answers WHERE phase = 'evaluate' GROUP BY run_id"
        assert dict(db.execute(evaluations)) == dict.fromkeys(ids[2:], 2)
    steps = site.steps
    assert site.ask(request(run, run_id=ids[-1])).header.error is None, "kept"
    assert site.ask(request(run, run_id=ids[0])).header.error == "conflict", "known to be trained"
    assert site.steps == steps


def test_two_answers_for_one_round_cannot_be_stored(site: Any, run: Any) -> None:
    site.ask(request(run))
    with pytest.raises(sqlite3.IntegrityError), sqlite3.connect(site.path) as db:
        db.execute("INSERT INTO answers VALUES (?, 'fit', 1, '', 'another', x'00')", (RUN_ID,))


def test_the_database_is_the_sites_alone(site: Any, run: Any) -> None:
    site.ask(request(run))
    for path in site.path.parent.glob("answers.db*"):
        assert path.stat().st_mode & 0o777 == 0o600, path


def test_an_answer_that_cannot_be_stored_does_not_leave(site: Any, run: Any) -> None:
    with sqlite3.connect(site.path) as db:
        db.execute("CREATE TRIGGER full BEFORE INSERT ON answers BEGIN SELECT RAISE(FAIL, 'disk full'); END")
    update = site.ask(request(run))
    assert update.header.error == "output" and len(update.arrays) == 0


def test_a_damaged_database_says_what_to_do(tmp_path: Path, make_sites: Any) -> None:
    (tmp_path / "answers.db").write_bytes(b"no database" * 100)
    with refuses(OutputError, "answers-not-opened", str(tmp_path / "answers.db")):
        AnswerStore(tmp_path / "answers.db", OneAtATime(Site(make_sites(north=3))))
