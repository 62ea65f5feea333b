"""What somebody with all rights to the database cannot do unnoticed while the anchor is out of reach."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from ledgers import EVENT, NOTES, Place, answer, key
from refusals import refuses

from quorate.client.privacy.ledger_records import canonical, digest
from quorate.shared.errors import LedgerError

ROUNDS = 20
EDITS = 200


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path / "site")
    place.fill(ROUNDS)
    assert not place.findings()
    return place


def edited(draw: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    """A row with one field changed to another value of its kind, or left out, or with one more."""
    new: dict[str, Any] = {
        name: dict(value) if isinstance(value, dict) else value for name, value in row.items()
    }
    paths = [(name,) for name in new] + [
        (name, inner) for name, value in new.items() if isinstance(value, dict) for inner in value
    ]
    path = draw.choice(paths)
    inside = new if len(path) == 1 else new[path[0]]
    name, value = path[-1], inside[path[-1]]
    how = draw.randrange(4)
    if how == 0:
        del inside[name]
    elif how == 1:
        inside["more"] = 1
    elif isinstance(value, int | float):
        inside[name] = value + draw.choice([-1, 1, 0.5])
    elif isinstance(value, str):
        at = draw.randrange(len(value))
        inside[name] = value[:at] + chr(ord(value[at]) ^ 1) + value[at + 1 :]
    else:
        inside[name] = None if value is not None else "x"
    return new


@pytest.mark.parametrize("hashed", [False, True], ids=["content", "content-and-hash"])
def test_every_edit_of_a_row_is_found(place: Place, tmp_path: Path, hashed: bool) -> None:
    draw, original = random.Random(11), place.database.read_bytes()
    before = place.rows()
    for number in range(EDITS):
        seq, row, _ = before[draw.randrange(len(before))]
        new = edited(draw, row)
        assert new != row
        text = canonical(new)
        place.tamper(("UPDATE rows SET content = ? WHERE seq = ?", (text, seq)))
        if hashed:
            place.tamper(("UPDATE rows SET hash = ? WHERE seq = ?", (digest(text), seq)))
        assert place.findings(), (number, seq, row, new)
        place.database.write_bytes(original)
    assert not place.findings()


def test_every_edit_of_a_byte_is_found(place: Place) -> None:
    draw, original = random.Random(12), place.database.read_bytes()
    rows = [(canonical(row).encode(), hash.encode()) for _, row, hash in place.rows()]
    for _ in range(EDITS):
        part = draw.choice(draw.choice(rows))
        assert original.count(part) >= 1
        at = original.index(part) + draw.randrange(len(part))
        flipped = bytes([original[at] ^ (1 << draw.randrange(8))])
        place.database.write_bytes(original[:at] + flipped + original[at + 1 :])
        assert place.findings()
    place.database.write_bytes(original)
    assert not place.findings()


def test_a_chain_written_anew_is_found_by_its_anchor(place: Place) -> None:
    draw, original = random.Random(13), place.database.read_bytes()
    before = [row for _, row, _ in place.rows()]
    for _ in range(EDITS // 4):
        at = draw.randrange(len(before))
        changed = {**before[at], "time": "2020-01-01T00:00:00+00:00"}
        place.write_anew([*before[:at], changed, *before[at + 1 :]])
        (finding,) = place.findings()
        assert f"row {at + 1} is not the one" in finding
        place.database.write_bytes(original)


def test_a_tail_cut_off_is_found(place: Place, tmp_path: Path) -> None:
    for kept in range(0, 2 * ROUNDS, 3):
        cut = place.copy(tmp_path / f"kept-{kept}")
        cut.tamper(("DELETE FROM rows WHERE seq > ?", (kept,)))
        assert f"rows {kept + 1} to {2 * ROUNDS} are missing" in " ".join(cut.findings())
    with refuses(LedgerError, "ledger-not-as-written") as caught:
        cut.open()
    assert " ".join(cut.findings()) in str(caught.value)


def test_a_backup_put_back_is_found(tmp_path: Path) -> None:
    place, backups = Place(tmp_path / "site"), []
    for round in range(1, 8):
        place.fill(1, first=round)
        backups.append(shutil.copytree(place.database.parent, tmp_path / f"backup-{round}"))
    for backup in backups[:-1]:
        shutil.rmtree(place.database.parent)
        shutil.copytree(backup, place.database.parent)
        assert "an older copy was put in its place" in " ".join(place.findings())
        with refuses(LedgerError, "ledger-not-as-written") as caught:
            place.open()
        assert " ".join(place.findings()) in str(caught.value)
    shutil.rmtree(place.database.parent)
    shutil.copytree(backups[-1], place.database.parent)
    assert not place.findings(), "a copy of the newest state is that state"


def test_a_backup_that_was_written_on_is_found(tmp_path: Path) -> None:
    place = Place(tmp_path / "site")
    place.fill(2)
    other = place.copy(tmp_path / "other")
    place.fill(3, first=3)
    other.fill(3, first=30)
    shutil.copy(other.database, place.database)
    assert "row 5 is not the one" in " ".join(place.findings())


def test_a_write_ahead_log_taken_away_is_found(tmp_path: Path) -> None:
    place = Place(tmp_path / "site")
    ledger = place.open()
    for round in range(3):
        ledger.commit(ledger.reserve(key(round), "notes", NOTES, EVENT), answer(round))
    copied = place.copy(tmp_path / "copied")  # while it is open: rows are in the log
    ledger.close()
    copied.database.with_name("ledger.db-wal").unlink()
    copied.database.with_name("ledger.db-shm").unlink()
    assert "rows 1 to 6 are missing" in " ".join(copied.findings())


def test_a_database_that_is_gone_or_no_database_is_found(place: Place) -> None:
    place.database.write_bytes(b"no database" * 100)
    assert "cannot be read as a database" in place.findings()[0]
    with pytest.raises(LedgerError):
        place.open()
    place.database.unlink()
    assert f"rows 1 to {2 * ROUNDS} are missing" in " ".join(place.findings())
    with pytest.raises(LedgerError):
        place.open()
    assert not place.database.exists(), "a refusal makes no new one"


def test_rows_in_another_order_or_with_gaps_are_found(place: Place) -> None:
    original = place.database.read_bytes()
    place.tamper(
        ("UPDATE rows SET seq = -1 WHERE seq = 3", ()),
        ("UPDATE rows SET seq = 3 WHERE seq = 5", ()),
        ("UPDATE rows SET seq = 5 WHERE seq = -1", ()),
    )
    assert place.findings()
    place.database.write_bytes(original)
    place.tamper(("DELETE FROM rows WHERE seq = 7", ()))
    assert "row 7 is missing" in " ".join(place.findings())


def test_an_edited_anchor_is_found(place: Place) -> None:
    original = place.heads.read_text()
    lines = original.splitlines()
    for number in range(1, len(lines)):
        seq, head, time = lines[number].split()
        for line in (
            f"{seq} {head[::-1]} {time}",
            f"{seq} {head}",
            "nothing",
            f"{int(seq) + 1} {head} {time}",
        ):
            place.heads.write_text("\n".join([*lines[:number], line, *lines[number + 1 :], ""]))
            a_crash_may_leave_it = number == len(lines) - 1 and lines[number].startswith(line)
            assert bool(place.findings()) != a_crash_may_leave_it, line
    place.heads.write_text("".join(f"{line}\n" for line in lines if not line.startswith("4 ")))
    assert place.findings()
    place.heads.write_text(original)
    assert not place.findings()


def test_a_noted_head_tells_when_database_and_anchor_are_put_back_together(tmp_path: Path) -> None:
    place = Place(tmp_path / "site")
    place.fill(2)
    older = place.copy(tmp_path / "older")
    place.fill(1, first=3)
    *_, (_, _, noted) = place.rows()
    assert not place.findings(noted) and not place.findings(noted[:12].upper())
    assert not older.findings(), "nothing here can tell"
    assert f"no row has the hash {noted}" in " ".join(older.findings(noted))
