"""The privacy ledger: rows are only added, what is spent counts at once, and no crash raises an alarm."""

from __future__ import annotations

import os
import sqlite3
import threading
from pathlib import Path

import pytest
from ledgers import EVENT, NOTES, Place, answer, key
from refusals import refuses

from quorate.client.privacy.ledger import Ledger
from quorate.client.privacy.ledger_records import BEFORE_ALL, Commit, ProtectedData
from quorate.client.privacy.ledger_verify import Anchor, anchor_line, verify
from quorate.shared.errors import LedgerError, OutputError
from quorate.shared.privacy.accounting import epsilon

ROUNDS = 4


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "site")


def assert_not_opened(place: Place) -> None:
    """Assert that it is refused for what `verify` finds."""
    assert place.findings()
    with refuses(LedgerError, "ledger-not-as-written") as caught:
        place.open()
    assert " ".join(place.findings()) in str(caught.value)


def spent(ledger: Ledger) -> int:
    return sum(entry.event.steps for entry in ledger.reservations)


def test_a_reservation_counts_at_once_and_is_used_again_until_its_answer_leaves(place: Place) -> None:
    ledger = place.open()
    first = ledger.reserve(key(1), "notes", NOTES, EVENT)
    assert (spent(ledger), ledger.uncommitted(key(1))) == (3, first)
    assert ledger.reserve(key(1), "notes", NOTES, EVENT) == first and spent(ledger) == 3
    ledger.close()
    ledger = place.open()
    assert ledger.reserve(key(1), "notes", NOTES, EVENT) == first and spent(ledger) == 3
    ledger.commit(first, answer(1))
    assert (spent(ledger), ledger.uncommitted(key(1)), ledger.answers(key(1))) == (3, None, {answer(1)})
    again = ledger.reserve(key(1), "notes", NOTES, EVENT)
    assert again != first and spent(ledger) == 6, "one answer has left, another one costs again"
    ledger.close()


@pytest.mark.parametrize("other", ["round", "run", "data", "unit", "event"])
def test_a_reservation_is_used_again_for_the_very_same_thing_alone(place: Place, other: str) -> None:
    ledger = place.open()
    ledger.reserve(key(1), "notes", NOTES, EVENT)
    ledger.reserve(
        {"round": key(2), "run": key(1, "other")}.get(other, key(1)),
        "notes",
        {"data": ProtectedData(places=("/data/b",)), "unit": NOTES.model_copy(update={"group": "who"})}.get(
            other, NOTES
        ),
        EVENT.model_copy(update={"steps": 4}) if other == "event" else EVENT,
    )
    assert len(ledger.reservations) == 2
    ledger.close()


def test_two_jobs_and_a_crash_cost_what_one_long_job_costs(place: Place) -> None:
    place.fill(2)
    ledger = place.open()
    ledger.reserve(key(3), "notes", NOTES, EVENT)
    ledger.close()  # as a crash leaves it: nothing of round 3 has left
    place.fill(1, first=3)
    place.fill(4, run_id="second")
    ledger = place.open()
    events = [entry.event for entry in ledger.reservations]
    ledger.close()
    assert len(events) == 7
    long = EVENT.model_copy(update={"steps": 7 * EVENT.steps})
    assert epsilon(events, 1e-5) == epsilon([long], 1e-5) < 7 * epsilon([EVENT], 1e-5)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE rows SET hash = hash",
        "DELETE FROM rows",
        "INSERT OR REPLACE INTO rows SELECT seq, content, 'x' FROM rows WHERE seq = 1",
        "INSERT INTO rows VALUES (99, '', '')",
    ],
)
def test_the_database_refuses_everything_but_the_next_row(place: Place, statement: str) -> None:
    place.fill(ROUNDS)
    with sqlite3.connect(place.database) as db, pytest.raises(sqlite3.IntegrityError) as caught:
        db.execute(statement)
    assert caught.value.sqlite_errorname == "SQLITE_CONSTRAINT_TRIGGER"
    assert not place.findings()


def test_the_files_are_the_sites_alone(place: Place) -> None:
    ledger = place.open()
    ledger.reserve(key(1), "notes", NOTES, EVENT)
    files = [*place.database.parent.iterdir(), place.heads]
    assert {path.name for path in files} >= {"ledger.db", "ledger.db-wal", "ledger.head"}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert place.database.parent.stat().st_mode & 0o777 == 0o700
    ledger.close()


def test_every_row_is_synced(place: Place) -> None:
    ledger = place.open()
    asked = ("PRAGMA journal_mode", "PRAGMA synchronous")
    assert [ledger._db.execute(each).fetchone()[0] for each in asked] == ["wal", 2], "2 is FULL"
    ledger.close()


def test_one_process_at_a_time(place: Place) -> None:
    ledger = place.open()
    with refuses(OutputError, where=str(place.database.parent)):
        place.open()
    ledger.close()
    place.open().close()


def test_the_chain_is_as_written_down(place: Place) -> None:
    place.fill(2)
    ledger = place.open()
    prev = BEFORE_ALL
    for number, row in enumerate(ledger.rows, start=1):
        assert (row.seq, row.prev) == (number, prev)
        prev = row.hash
    assert ledger.head == prev
    assert [row.reservation for row in ledger.rows if isinstance(row, Commit)] == [1, 3]
    assert Anchor(place.heads).read().hashes == (BEFORE_ALL, *(row.hash for row in ledger.rows))
    ledger.close()


def test_a_commit_needs_an_open_reservation(place: Place) -> None:
    place.fill(1)
    rows = [row for _, row, _ in place.rows()]
    for bad in ([rows[1]], [rows[0], rows[1], rows[1]], [rows[0], {**rows[1], "reservation": 2}]):
        place.write_anew(bad)
        assert "which is no open reservation" in " ".join(place.findings())


# Crashes


def test_a_crash_at_any_byte_of_the_anchor_is_no_alarm_and_is_mended(place: Place, tmp_path: Path) -> None:
    place.fill(ROUNDS)
    whole = place.heads.read_bytes()
    newest = whole.splitlines(keepends=True)[-1]
    for cut in range(len(newest) + 1):
        torn = place.copy(tmp_path / f"cut-{cut}")
        torn.heads.write_bytes(whole[: len(whole) - cut])
        assert not torn.findings(), cut
        torn.open().close()
        assert not torn.findings() and Anchor(torn.heads).read().newest == 2 * ROUNDS
        torn.fill(1, first=90)
        assert not torn.findings() and Anchor(torn.heads).read().newest == 2 * ROUNDS + 2


def test_crashes_while_a_crash_is_mended(place: Place) -> None:
    place.fill(ROUNDS)
    *_, newest = place.heads.read_text().splitlines()
    rest = place.heads.read_text().removesuffix(f"{newest}\n")
    # Cut short three times, once with the zeros that some file systems leave.
    place.heads.write_text(f"{rest}{newest[:9]}\n{newest[:3]}\n\n{newest[:5]}\0\0")
    assert not place.findings()
    place.open().close()
    assert not place.findings() and Anchor(place.heads).read().newest == 2 * ROUNDS


def test_the_anchor_may_lack_the_newest_row_and_no_more(place: Place) -> None:
    place.fill(ROUNDS)
    lines = place.heads.read_text().splitlines(keepends=True)
    place.heads.write_text("".join(lines[:-1]))
    assert not place.findings()
    place.heads.write_text("".join(lines[:-2]))
    assert "its end is gone" in " ".join(place.findings())
    assert_not_opened(place)


def test_a_crash_while_the_ledger_is_made_is_no_alarm(place: Place) -> None:
    place.open().close()
    for path in place.database.parent.iterdir():
        path.unlink()
    assert not place.findings(), "the anchor comes first"
    place.database.touch(0o600)
    assert not place.findings(), "then an empty file"
    place.open().close()
    place.fill(1)
    assert not place.findings()


def test_what_cannot_be_written_is_not_spent_on(place: Place) -> None:
    place.fill(1)
    ledger = place.open()
    with sqlite3.connect(place.database) as db:
        db.execute("CREATE TRIGGER full BEFORE INSERT ON rows BEGIN SELECT RAISE(FAIL, 'disk full'); END")
    with refuses(OutputError, where=str(place.database)):
        ledger.reserve(key(2), "notes", NOTES, EVENT)
    with sqlite3.connect(place.database) as db:
        db.execute("DROP TRIGGER full")
    assert ledger.reserve(key(2), "notes", NOTES, EVENT) == 3
    ledger.close()
    assert not place.findings()


def test_what_cannot_be_anchored_is_not_spent_on(place: Place) -> None:
    place.fill(1)
    ledger = place.open()
    away = place.heads.rename(place.heads.with_name("away"))
    with pytest.raises(OutputError) as unwritten:
        ledger.reserve(key(2), "notes", NOTES, EVENT)
    assert str(place.heads) in str(unwritten.value)
    with refuses(LedgerError, "ledger-not-as-written") as caught:
        ledger.reserve(key(2), "notes", NOTES, EVENT)
    assert " ".join(place.findings()) in str(caught.value) and place.findings()
    away.rename(place.heads)
    reserved = ledger.reserve(key(2), "notes", NOTES, EVENT)
    assert reserved == 3 and len(ledger.reservations) == 2, "the row that the anchor lacked"
    ledger.commit(reserved, answer(2))
    ledger.close()
    assert not place.findings()


def test_an_anchor_that_is_gone_is_not_made_anew(place: Place) -> None:
    place.fill(1)
    place.heads.unlink()
    assert "is missing, and the database has 2 rows" in " ".join(place.findings())
    assert_not_opened(place)
    assert not place.heads.exists()


def test_a_check_meanwhile_is_no_alarm(place: Place) -> None:
    ledger, found, end = place.open(), [], threading.Event()

    def look() -> None:
        while not end.is_set():
            found.append(verify(place.database, Anchor(place.heads)))

    watcher = threading.Thread(target=look)
    watcher.start()
    for round in range(60):
        ledger.commit(ledger.reserve(key(round), "notes", NOTES, EVENT), answer(round))
    end.set()
    watcher.join()
    ledger.close()
    assert len({len(each.rows) for each in found}) > 5, "it looked at several states"
    assert {each.findings for each in found} == {()}


def test_a_ledger_left_by_a_kill_is_checked_without_being_opened(place: Place) -> None:
    pid = os.fork()
    if pid == 0:
        ledger = place.open()
        ledger.reserve(key(1), "notes", NOTES, EVENT)
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    assert place.database.with_name("ledger.db-wal").stat().st_size > 0
    verdict = verify(place.database, Anchor(place.heads))
    assert len(verdict.rows) == 1 and not verdict.findings
    assert place.heads.read_text().splitlines()[-1] == anchor_line(verdict.rows[0])
