"""What is done with a site's data can be seen at the site: each message in the log, each run in a book."""

from __future__ import annotations

import json
import logging
import os
import pwd
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from refusals import refuses
from site_folder import RUN_ID, request, sha256_of, write_folder
from whole_site import WholeSite

from quorate.client.policy.approvals import approval, approve, is_approved, rejoin, withdraw, withdrawal
from quorate.client.process import reload
from quorate.client.runs import run_history, runs_report
from quorate.client.runs.run_history import DATABASE, Asked, Left, RunHistory
from quorate.client.runs.runs_report import RunAtSite, runs_of
from quorate.deploy.cli import run as quorate
from quorate.shared.errors import OutputError
from quorate.shared.process.files import take_lock

OTHER = "f" * 16
ME = pwd.getpwuid(os.getuid()).pw_name


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(reload, "SETTLE_SECONDS", 0.0)
    caplog.set_level(logging.INFO, "quorate")


@pytest.fixture
def site(make_site: Any) -> WholeSite:
    whole: WholeSite = make_site()
    return whole


@pytest.fixture
def pinned(pinned: Any) -> Any:
    return partial(pinned, federation={"rounds": 5})


@pytest.fixture
def listening(site: WholeSite) -> Iterator[None]:
    """As long as the process that listens has the socket's lock."""
    with (site.folder.state / "site.lock").open("w") as lock:
        take_lock(lock.fileno())
        yield


def only(site: WholeSite) -> RunAtSite:
    (found,) = runs_of(site.folder)
    return found


def test_a_run_is_known_from_its_first_message_to_its_end(
    site: Any, pinned: Any, caplog: Any, listening: None
) -> None:
    run, seen = pinned(), list[RunAtSite]()
    assert runs_of(site.folder) == []
    site.ask(request(run, "join", 0))
    assert only(site).state == "open" and set(only(site).left) == {"description", "header"}
    site.on_step = lambda: seen.append(only(site))
    fits = [site.ask(request(run, round=round)) for round in (1, 2)]
    site.ask(request(run, "evaluate", 2, split="test"))
    assert [each.state for each in seen] == ["working"] * 6
    working = seen[-1].in_hand
    assert working is not None and (working.phase, working.round) == ("fit", 2)

    found = only(site)
    assert (found.run_id, found.name, found.state) == (RUN_ID, "test", "open")
    assert (found.federation, found.server) == ("trial", "localhost:9443")
    assert (found.data, found.rows, found.model) == ("notes", 58, sha256_of(site_model(run, site)))
    assert (found.rounds, found.round, found.trained) == (5, 2, 2)
    assert (found.answered, found.refused, found.refusal, found.privacy) == (4, 0, None, None)
    assert found.left["arrays"] == sum(each.arrays.num_bytes for each in fits)
    assert set(found.left) == {"arrays", "description", "header", "counts", "metrics", "outcomes", "seconds"}
    assert found.seconds > 0 and found.started <= found.heard and found.finished is None

    lines = [line for line in caplog.messages if line.startswith(f"run {RUN_ID} (test), round ")]
    assert len(lines) == 4, "each message is one line"
    assert f"round 2, fit: answered with {len(fits[1].encoded)} bytes: arrays, counts, metrics" in lines[2]
    assert "round 2, evaluate on test: answered" in lines[3] and "outcomes" in lines[3]


def site_model(_run: Any, site: WholeSite) -> Path:
    return Path(site.folder.config.models[0].path)


def test_a_stored_answer_that_leaves_again_is_counted_and_is_no_round(site: Any, pinned: Any) -> None:
    first = site.ask(request(pinned()))
    once = only(site)
    assert site.ask(request(pinned())).encoded == first.encoded
    twice = only(site)
    assert (once.trained, twice.trained) == (1, 1)
    assert twice.left["arrays"] == 2 * once.left["arrays"] and twice.answered == 2


def test_a_refusal_is_kept_with_its_rule(site: Any, pinned: Any, caplog: Any) -> None:
    site.configure(max_rank=3)
    site.ask(request(pinned(), "join", 0))
    found = only(site)
    assert (found.state, found.answered, found.refused, found.left) == ("refused", 0, 1, {})
    assert found.refusal is not None and found.refusal.code == "policy-rank"
    assert "policy.max_rank is 3" in found.refusal.why
    assert f"run {RUN_ID} (test), round 0, join: policy-rank (nothing but this code left)" in caplog.text
    site.configure(max_rank=64)
    site.ask(request(pinned(seed=4), "join", 0))
    assert only(site).state == "open"
    site.ask(request(pinned(seed=5), "join", 0))
    again = only(site)
    assert again.refusal is not None and again.refusal.code == "other-config"
    assert again.state == "open", "what began under an id stays what it is"


def test_what_is_no_run_is_logged_and_not_kept(site: Any, pinned: Any, caplog: Any) -> None:
    assert site.ask(request(pinned(), run_id="../../x")).header.error == "protocol"
    assert site.ask(request(pinned(), config_hash="0" * 64)).header.error == "protocol"
    assert runs_of(site.folder) == []
    assert "run '../../x', round 1, fit: protocol" in caplog.text


def test_who_approved_and_who_withdrew(site: Any, pinned: Any) -> None:
    site.configure(approve_each_run=True)
    site.ask(request(pinned(), "join", 0))
    assert only(site).state == "waiting" and only(site).approval is None
    before = time.time()
    approve(site.folder.state, RUN_ID)
    word = only(site).approval
    assert word is not None and word.by == ME and before - 1 <= word.at.timestamp() <= time.time()
    assert word.config_hash == pinned().content_hash
    assert site.ask(request(pinned(), "join", 0)).header.error is None
    withdraw(site.folder.state, RUN_ID)
    withdraw(site.folder.state, RUN_ID)
    left = only(site)
    assert (left.state, left.approval) == ("withdrawn", word), "who had approved it stays known"
    assert left.withdrawal is not None and left.withdrawal.by == ME
    assert site.ask(request(pinned())).header.error == "withdrawn"
    rejoin(site.folder.state, RUN_ID)
    assert withdrawal(site.folder.state, RUN_ID) is None and approval(site.folder.state, RUN_ID) is None


def test_an_approval_of_the_release_before_still_holds(tmp_path: Path) -> None:
    (tmp_path / "approved").mkdir()
    (tmp_path / "approved" / RUN_ID).write_text("a" * 64)
    assert is_approved(tmp_path, RUN_ID, "a" * 64) and not is_approved(tmp_path, RUN_ID, "b" * 64)
    assert approval(tmp_path, RUN_ID).by == "unknown"
    for damaged in (b"", b"{}", b"\xff"):
        (tmp_path / "approved" / RUN_ID).write_bytes(damaged)
        assert not is_approved(tmp_path, RUN_ID, "")


def test_a_private_run_shows_its_claim(site: Any, pinned: Any) -> None:
    run = pinned(privacy={"unit": "record", "noise_multiplier": 1.0})
    claim = site.ask(request(run, "join", 0)).header.description.privacy
    found = only(site)
    assert found.claim == claim.sentence and found.privacy == "record (noise at this site)"


def test_a_finished_run_is_finished(site: Any, pinned: Any) -> None:
    joined = site.ask(request(pinned(), "join", 0))
    told = {"rounds": 5, "best_round": 5, "metric": "accuracy"}
    assert site.ask(request(pinned(), "finish", 5, joined.arrays, delivery=told)).header.error is None
    assert only(site).state == "finished" and only(site).finished is not None


def test_a_run_that_is_not_heard_of_is_silent(site: Any, pinned: Any, monkeypatch: Any) -> None:
    site.ask(request(pinned(), "join", 0))
    monkeypatch.setattr(runs_report, "SILENT_SECONDS", -1.0)
    assert only(site).state == "silent"


def test_what_cannot_be_written_down_does_not_leave(site: Any, pinned: Any) -> None:
    site.ask(request(pinned(), "join", 0))
    with sqlite3.connect(site.folder.state / DATABASE) as db:
        db.execute("CREATE TRIGGER full BEFORE INSERT ON sent BEGIN SELECT RAISE(FAIL, 'disk full'); END")
    update = site.ask(request(pinned()))
    assert (update.header.error, len(update.arrays)) == ("output", 0)
    with sqlite3.connect(site.folder.state / DATABASE) as db:
        db.execute("DROP TRIGGER full")
    steps = site.steps
    assert site.ask(request(pinned())).header.error is None and site.steps == steps, "it was stored"


def test_the_book_is_the_sites_alone_and_reading_leaves_nothing(site: Any, pinned: Any) -> None:
    site.ask(request(pinned(), "join", 0))
    before = sorted(path.name for path in site.folder.state.iterdir())
    assert only(site).answered == 1
    assert sorted(path.name for path in site.folder.state.iterdir()) == before
    assert (site.folder.state / DATABASE).stat().st_mode & 0o777 == 0o600


def test_a_damaged_book_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / DATABASE).write_bytes(b"no database" * 100)
    with refuses(OutputError, where=str(tmp_path / DATABASE)):
        RunHistory(tmp_path / DATABASE)


KILLED = """
import os, signal, sys
from pathlib import Path
from quorate.client.runs.run_history import Asked, Left, RunHistory

book = RunHistory(Path(sys.argv[1]))
asked = Asked("a" * 16, "c", "run", "trial", "localhost:1", "t", "notes", None, None, 5)
book.begin(asked, "join", 0)
book.end(asked, "join", 0, Left({"description": 10}, rows=58))
book.begin(asked, "fit", 1)
if sys.argv[2] == "in a transaction":
    book._db.execute("PRAGMA cache_size = 1")
    book._db.execute("PRAGMA cache_spill = 1")
    book._db.execute("BEGIN IMMEDIATE")
    book._db.execute("UPDATE runs SET name = 'half'")
    for number in range(200):  # more than it keeps in memory, so that pages are on disk already
        book._db.execute("INSERT INTO sent VALUES (?, ?, 1, 1)", ("a" * 16, f"{number}" * 500))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["at work", "in a transaction"])
def test_a_kill_loses_nothing_that_was_written(tmp_path: Path, tiny_bert: Path, moment: str) -> None:
    folder = write_folder(tmp_path / "kit", tiny_bert)
    folder.state.mkdir()
    path = folder.state / DATABASE
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path), moment], capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr
    assert path.with_name(f"{DATABASE}-journal").exists() == (moment == "in a transaction")
    (found,) = runs_of(folder)
    assert (found.name, found.rows, found.answered, found.left) == ("run", 58, 1, {"description": 10})
    assert (found.state, found.in_hand) == ("open", None), "nobody works on it"
    book = RunHistory(path)
    book.settle()
    assert runs_of(folder)[0] == found
    book.close()


def test_what_is_kept_is_limited_and_who_is_refused_pushes_nobody_out(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "kit", tiny_bert)
    folder.state.mkdir()
    monkeypatch.setattr(run_history, "KEEP", 3)
    monkeypatch.setattr(run_history, "KEEP_REFUSED", 2)
    book = RunHistory(folder.state / DATABASE)

    def one(number: int, left: Left | None) -> None:
        asked = Asked(f"{number:016x}", "c", "run", "trial", "localhost:1", "t", "notes", None, None, 5)
        book.begin(asked, "join", 0)
        book.end(asked, "join", 0, left, "" if left else "policy-rank")

    for number in range(5):
        one(number, Left({"description": 10}))
    assert len(runs_of(folder)) == 5, "the limits by the day count these"
    with sqlite3.connect(folder.state / DATABASE) as db:
        db.execute("UPDATE runs SET begun_at = begun_at - 3 * 86400")
    for number in range(5, 10):
        one(number, None)
    assert {int(each.run_id, 16) for each in runs_of(folder)} == {2, 3, 4, 8, 9}
    with sqlite3.connect(folder.state / DATABASE) as db:
        assert db.execute("SELECT count(*) FROM sent").fetchone() == (3,)
    book.close()


def test_the_command(site: Any, pinned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(site.folder.path)
    assert quorate(["site", "runs", folder]) == 0 and "no run has asked" in capsys.readouterr().out
    site.ask(request(pinned(), "join", 0))
    site.ask(request(pinned(adapter={"r": 65}), "join", 0, run_id=OTHER))
    site.ask(request(pinned()))
    assert quorate(["site", "runs", folder, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["runs"]
    assert [(each["run_id"], each["state"]) for each in listed] == [(RUN_ID, "open"), (OTHER, "refused")]
    assert listed[0] == runs_of(site.folder)[0].model_dump(mode="json")
    assert quorate(["site", "runs", folder, "--run", OTHER]) == 0
    told = capsys.readouterr().out
    assert "policy.max_rank is 64" in told and "federation trial" in told
    assert quorate(["site", "runs", folder]) == 0
    assert RUN_ID[:8] in capsys.readouterr().out
    assert quorate(["site", "runs", folder, "--run", "0" * 16]) == 2
