"""Which data sets are one, which budgets hold for a run, and what `site ledger` says of them."""

from __future__ import annotations

import io
import json
import runpy
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
from ledgers import EVENT, NOTES, Place, answer, key
from pydantic import ValidationError
from site_folder import write_folder

from quorate.client.node.folder import SiteFolder
from quorate.client.policy.site_config import SiteConfig
from quorate.client.privacy.account_report import accounts
from quorate.client.privacy.budgets import Budgets, places, protected_data
from quorate.client.privacy.ledger import open_ledger
from quorate.client.privacy.ledger_records import ProtectedData
from quorate.deploy.site_cli import run
from quorate.shared.privacy.accounting import epsilon
from quorate.shared.privacy.rounding import at_least, at_most

PAGE = Path(__file__).resolve().parents[4] / "docs" / "ledger.md"
ROUNDS = 3


def at(*where: str, group: str | None = None) -> ProtectedData:
    return ProtectedData(places=where, group=group)


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        (at("/data/a.csv"), at("/data/a.csv"), True),
        (at("/data"), at("/data/a.csv"), True),
        (at("/data/a"), at("/data/ab"), False),
        (at("/link", "/data/a"), at("/data/a"), True),
        (at("hub:org/name"), at("hub:org/name"), True),
        (at("hub:org"), at("hub:org/name"), False),
        (at("/data"), at("/data", group="patient"), False),
        (at("/data", group="patient"), at("/data/a", group="patient"), True),
        (at("/data", group="patient"), at("/data", group="ward"), False),
    ],
)
def test_what_shares_units(one: ProtectedData, other: ProtectedData, shared: bool) -> None:
    assert one.shares_units_with(other) == other.shares_units_with(one) == shared


def test_places_are_as_written_and_with_links_followed(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "may").mkdir()
    (tmp_path / "june").mkdir()
    link = tmp_path / "current"
    link.symlink_to("may")
    first = at(*places("current", tmp_path, "data.x"))
    assert first.places == (str(link), str(tmp_path / "may"))
    link.unlink()
    link.symlink_to("june")
    assert at(*places("./current", tmp_path, "data.x")).shares_units_with(first), "the same name tomorrow"
    assert at(*places("may", tmp_path, "data.y")).shares_units_with(first), "the same place by another name"
    assert not at(*places("june", tmp_path, "data.y")).shares_units_with(first)
    monkeypatch.setenv("HERE", str(tmp_path))
    assert places("${HERE}/may/../may", Path("/"), "data.z") == (str(tmp_path / "may"),)
    assert places("hub:org/name", tmp_path, "data.h") == ("hub:org/name",)


def site(**fields: Any) -> SiteConfig:
    data = {"notes": {"source": "/data/notes.csv", "columns": {"group": "patient"}}}
    return SiteConfig.model_validate({"data": data, **fields})


@pytest.mark.parametrize(
    ("budgets", "place", "kind", "facts"),
    [
        ([{"data": "scans"}], (), "value_error", ("[0]", "scans", "notes")),
        ([{"data": "notes", "group": "ward"}], (), "value_error", ("[0]", "'ward'", "data.notes")),
        ([{"data": "notes"}, {"data": "notes"}], (), "value_error", ("[1]",)),
        ([{"data": "notes", "delta": 0}], ("delta",), "greater_than", ()),
        ([{"data": "notes", "max_epsilon": 0}], ("max_epsilon",), "greater_than", ()),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused(
    budgets: list[dict[str, Any]], place: tuple[str, ...], kind: str, facts: tuple[str, ...]
) -> None:
    full = [{"max_epsilon": 1, "delta": 1e-5, **each} for each in budgets]
    with pytest.raises(ValidationError) as caught:
        site(policy={"privacy_budgets": full})
    (found,) = caught.value.errors()
    assert (found["loc"], found["type"]) == (("policy", "privacy_budgets", 0, *place) if place else (), kind)
    assert all(fact in found["msg"] for fact in facts)


def test_an_account_is_of_all_that_shares_the_units(tmp_path: Path) -> None:
    place = Place(tmp_path)
    ledger = place.open()
    copy, group = at("/archive/notes.csv"), NOTES.model_copy(update={"group": "patient"})
    for round, (alias, protects) in enumerate(
        [("notes", NOTES), ("folder", at("/data")), ("copy", copy), ("notes", group), ("own", at("/own"))]
    ):
        ledger.reserve(key(round), alias, protects, EVENT)
    entries = ledger.reservations
    ledger.close()
    budget = {"data": "notes", "max_epsilon": 3, "delta": 1e-6}
    config = site(policy={"privacy_budgets": [budget, {**budget, "group": "patient"}]})
    found = accounts(Budgets(config, tmp_path, epsilon), entries)
    assert [(each.data, each.group, each.entries) for each in found] == [
        ("notes", None, 2),
        ("notes", "patient", 1),
        ("copy", None, 1),
        ("own", None, 1),
    ]
    two = EVENT.model_copy(update={"steps": 2 * EVENT.steps})
    assert found[0].epsilon == epsilon([two], 1e-6) and found[0].remaining == 3 - found[0].epsilon
    assert (found[2].max_epsilon, found[2].remaining, found[2].delta) == (None, None, 1e-5)
    config = site(policy={"privacy_budgets": [{**budget, "also": ["/archive/notes.csv"]}]})
    assert accounts(Budgets(config, tmp_path, epsilon), entries)[0].entries == 3


# The commands


@pytest.fixture
def folder(tmp_path: Path) -> SiteFolder:
    """A site whose ledger has some rounds, of which the last one was not committed."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).touch()
    budget = {"data": "notes", "max_epsilon": 5, "delta": 1e-5}
    kit = write_folder(tmp_path / "kit", model, privacy_budgets=[budget])
    protects = protected_data(kit.config, kit.path, "notes", None)
    ledger = open_ledger(kit)
    for round in range(1, ROUNDS + 1):
        number = ledger.reserve(key(round), "notes", protects, EVENT)
        if round < ROUNDS:
            ledger.commit(number, answer(round))
    ledger.close()
    return kit


def ask(capsys: Any, *words: str) -> tuple[int, str, str]:
    code = run(["site", "ledger", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_show(folder: SiteFolder, capsys: Any) -> None:
    code, out, _ = ask(capsys, "show", str(folder.path), "--json")
    told = json.loads(out)
    (account,) = told["accounts"]
    events = EVENT.model_copy(update={"steps": ROUNDS * EVENT.steps})
    spent = epsilon([events], 1e-5)
    assert (code, told["ok"], told["rows"]) == (0, True, 2 * ROUNDS - 1)
    assert (account["entries"], account["epsilon"], account["max_epsilon"]) == (ROUNDS, spent, 5)
    assert account["remaining"] == 5 - spent
    code, out, _ = ask(capsys, "show", str(folder.path))
    assert code == 0 and at_most(spent, 4) in out and at_least(5 - spent, 4) in out and told["head"] in out


def test_verify(folder: SiteFolder, capsys: Any) -> None:
    code, out, _ = ask(capsys, "verify", str(folder.path), "--json")
    head = json.loads(out)["head"]
    assert code == 0 and json.loads(out)["findings"] == []
    assert ask(capsys, "verify", str(folder.path), "--head", head[:12])[0] == 0
    code, out, err = ask(capsys, "verify", str(folder.path), "--head", "0" * 12)
    assert code == 2 and "WRONG: " in err and "was noted as a head" in err
    assert ask(capsys, "verify", str(folder.path), "--head", "abc")[0] == 2
    (folder.ledger / "ledger.db").unlink()
    code, out, err = ask(capsys, "verify", str(folder.path))
    assert code == 2 and "rows 1 to 5 are missing" in err and "all is well" not in out
    assert ask(capsys, "show", str(folder.path))[0] == 2


def test_a_site_without_a_ledger_has_nothing_to_verify(folder: SiteFolder, capsys: Any) -> None:
    for path in (*folder.ledger.iterdir(), *folder.anchor.iterdir()):
        path.unlink()
    assert ask(capsys, "verify", str(folder.path))[0] == 0
    assert "0 rows" in ask(capsys, "show", str(folder.path))[1]
    assert not list(folder.ledger.iterdir()) and not list(folder.anchor.iterdir()), "looking makes nothing"


def test_export_is_checked_by_the_ten_lines_of_the_page(
    folder: SiteFolder, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    file, script = tmp_path / "out.jsonl", tmp_path / "check.py"
    script.write_text(PAGE.read_text().split("```python\n")[1].split("```")[0])
    code, out, _ = ask(capsys, "export", str(folder.path), "-o", str(file))
    assert code == 0 and file.stat().st_mode & 0o777 == 0o600
    assert ask(capsys, "export", str(folder.path))[1] == file.read_text()
    monkeypatch.setattr(sys, "stdin", io.StringIO(file.read_text()))
    runpy.run_path(str(script))
    head = capsys.readouterr().out.split()[-1]
    assert head in out and len(head) == 64
    before = file.read_text()
    code, _, err = ask(capsys, "export", str(folder.path), "-o", str(file))
    assert code == 2 and "is there already" in err and file.read_text() == before, "nothing is overwritten"
    edited = io.StringIO(before.replace('"steps": 3', '"steps": 2', 1))
    monkeypatch.setattr(sys, "stdin", edited)
    with pytest.raises(AssertionError) as caught:
        runpy.run_path(str(script))
    assert "row 1 " in str(caught.value)


def test_export_of_a_ledger_that_was_tampered_with_has_all_its_rows(folder: SiteFolder, capsys: Any) -> None:
    with sqlite3.connect(folder.ledger / "ledger.db") as db:
        db.execute("DROP TRIGGER no_update")
        db.execute("UPDATE rows SET content = 'nothing' WHERE seq = 2")
    code, out, err = ask(capsys, "export", str(folder.path))
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 2 and "row 2 was edited" in err
    assert len(lines) == 2 * ROUNDS - 1 and lines[1]["row"] == "nothing" and lines[2]["row"]["seq"] == 3
