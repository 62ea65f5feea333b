"""A site's secret of its splits, and its book of rows that private runs were trained on, on a real folder."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import yaml
from refusals import refuses
from site_folder import SITE, request, sha256_of, write_folder

from quorate.client.data.quality_report import inspect_own_data
from quorate.client.data.split_key import open_splits
from quorate.client.node.folder import SiteFolder
from quorate.client.process.chain import build_chain
from quorate.client.site.request import Request
from quorate.client.site.site import Site
from quorate.client.site.site_data import SiteData
from quorate.shared.errors import LedgerError
from quorate.shared.protocol.messages import Split, Update

MEASURED: tuple[Split, ...] = ("validation", "test")
LABELS = ("cardiac", "hepatic", "pulmonary")
PRIVATE = {"unit": "record", "noise_multiplier": 1.0}


class Place:
    """The folder of a site with 90 rows of thirty patients, and what its process is made of."""

    def __init__(self, path: Path, model: Path) -> None:
        write_folder(path, model)
        self.path, self.model = path, model
        self.write(90)
        self.start()

    def write(self, rows: int, name: str = "notes.csv") -> None:
        lines = [f"note {n} {'abc'[n % 3]},{LABELS[n % 3]},{n % 30}" for n in range(rows)]
        (self.path / name).write_text("text,label,patient\n" + "\n".join(lines) + "\n")

    def configure(self, **source: Any) -> None:
        file = self.path / "site.yaml"
        content = yaml.safe_load(file.read_text())
        content["data"]["notes"] = {"source": "notes.csv", **source}
        file.write_text(yaml.safe_dump(content))

    def start(self) -> None:
        self.folder = SiteFolder.find(self.path)
        self.folder.state.mkdir(exist_ok=True)
        self.at_site = SiteData(self.folder)
        self.chain = build_chain(self.folder, self.at_site, Site(self.at_site))

    def stop(self) -> None:
        self.chain.close()

    def restart(self) -> None:
        self.stop()
        self.start()

    def ask(self, run: Any, phase: str = "fit", **fields: Any) -> Update:
        return self.chain.accounted.handle(Request.read(request(run, phase, **fields)))

    def texts(self, run: Any) -> dict[Split, list[str]]:
        rows = self.at_site.rows(run, SITE)
        return {split: [row.values["text"] for row in members] for split, members in rows.items()}


@pytest.fixture
def place(tmp_path: Path, tiny_bert: Path) -> Iterator[Place]:
    made = Place(tmp_path / "kit", tiny_bert)
    yield made
    made.stop()


@pytest.fixture
def make(tiny_bert: Path, make_run: Any) -> Any:
    def run(**sections: Any) -> Any:
        return make_run(
            model={"sha256": sha256_of(tiny_bert)},
            federation={"rounds": 3},
            training={"max_steps": 1},
            **sections,
        )

    return run


def measured(texts: dict[Split, list[str]]) -> set[str]:
    return {text for split in MEASURED for text in texts[split]}


@pytest.mark.parametrize("group", [None, "patient"], ids=["records", "groups"])
def test_rows_trained_on_stay_out_of_what_is_measured(place: Place, make: Any, group: str | None) -> None:
    """One row more and a restart; then other shares, whose row is whose, and files of the site's own."""
    columns = {} if group is None else {"columns": {"group": group}}
    place.configure(**columns)
    place.restart()
    private = make(privacy={**PRIVATE, "unit": "record" if group is None else "group"})
    before = place.texts(private)
    trained = set(before["train"])
    assert len(trained) > 30 and all(before[split] for split in MEASURED)
    assert place.ask(private).header.error is None

    place.write(91)
    place.restart()
    for run in (private, make()):
        after = place.texts(run)
        assert {text: split for split in after for text in after[split] if "note 90 " not in text} == {
            text: split for split in before for text in before[split]
        }, "the same row is on the same side"

    place.configure(split={"validation": 0.35, "test": 0.35}, **columns)
    place.restart()
    for run in (private, make()):
        assert measured(place.texts(run)) and not measured(place.texts(run)) & trained

    place.configure(split={"validation": 0.4, "test": 0.4})  # nobody says any more whose row it is
    place.restart()
    assert not measured(place.texts(make())) & trained

    (place.path / "own").mkdir()
    for name, rows in (("train", 3), ("test", 120)):
        place.write(rows, f"own/{name}.csv")
    place.configure(source="own", **columns)
    place.restart()
    own = place.texts(make())
    assert not set(own["test"]) & trained, "whatever file names them"
    rows_of_group = 1 if group is None else 4 / 3  # there is a fourth row of each patient now
    left_out = round(len(trained) * rows_of_group)
    assert len(own["test"]) == 120 - left_out
    update = place.ask(make(), "evaluate", split="test", run_id="f" * 16)
    assert update.header.error is None and update.header.num_examples == len(own["test"])
    report = inspect_own_data(place.folder.config, place.path, make())
    assert report.sources[0].rows["test"] == 120 and report.sites[0].splits["test"].rows == len(own["test"])
    assert any(str(left_out) in note for note in report.notes)


def test_a_group_that_was_trained_on_is_not_measured_by_its_other_rows(place: Place, make: Any) -> None:
    place.configure(columns={"group": "patient"})
    place.restart()
    private = make(privacy={**PRIVATE, "unit": "group"})
    patients = {row.group for row in place.at_site.rows(private, SITE)["train"]}
    assert place.ask(private).header.error is None
    (place.path / "own").mkdir()
    place.write(3, "own/train.csv")
    lines = [f"another note {n},hepatic,{n}" for n in range(30)]
    (place.path / "own/test.csv").write_text("text,label,patient\n" + "\n".join(lines) + "\n")
    place.configure(source="own", columns={"group": "patient"})
    place.restart()
    assert {row.group for row in place.at_site.rows(make(), SITE)["test"]} == {
        str(n) for n in range(30)
    } - patients


def in_the_book(place: Place) -> int:
    """How many rows and groups are written down as trained on."""
    with closing(sqlite3.connect(open_splits(place.folder).book)) as db:
        return int(db.execute("SELECT count(*) FROM trained").fetchone()[0])


def test_what_a_run_is_given_does_not_depend_on_who_asked_before(place: Place, make: Any) -> None:
    """A plain run trains on doubles of measured rows, a private one on none, and they may take turns."""
    (place.path / "own").mkdir()
    place.write(60, "own/train.csv")
    place.write(20, "own/test.csv")
    place.configure(source="own", columns={"group": "patient"}, split={"validation": 0})
    plain, record, group = runs = [make(), make(privacy=PRIVATE), make(privacy={**PRIVATE, "unit": "group"})]
    alone = []
    for run in runs:
        place.restart()
        alone.append(place.texts(run))
    assert [len(texts["train"]) for texts in alone] == [60, 40, 40]
    for order in permutations(range(len(runs))):
        place.restart()
        for turn in (*order, *order):
            assert place.texts(runs[turn]) == alone[turn], order

    for run, written in ((record, 40), (group, 40 + 30)):
        for other in (group, record, plain):
            place.texts(other)
        place.at_site.write_down(run)
        assert in_the_book(place) == written, "the rows of that run, and its patients where it protects them"


def test_rows_are_written_down_before_they_are_trained_on(
    place: Place, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = make(privacy=PRIVATE)
    trained = place.texts(private)["train"]
    book = open_splits(place.folder).book
    seen: list[bool] = []
    handle = place.chain.answered.handle

    def noting(request: Any) -> Any:
        with closing(sqlite3.connect(book)) as db:
            seen.append(db.execute("SELECT count(*) FROM trained").fetchone() == (len(trained),))
        return handle(request)

    monkeypatch.setattr(place.chain.answered, "handle", noting)
    assert place.ask(private).header.error is None and seen == [True]
    monkeypatch.undo()
    spent = place.chain.accounted.open().rows
    book.unlink()
    book.mkdir()  # what cannot be written
    assert place.ask(private, round=2).header.error == "output"
    assert place.chain.accounted.open().rows == spent, "nothing was reserved, and so nothing trained"


def test_the_key_is_secret_and_never_made_again(place: Place, make: Any) -> None:
    texts = place.texts(make())
    splits = place.folder.state / "splits"
    key = (splits / "key").read_bytes()
    assert len(key) == 32
    for path in (splits / "key", splits / "trained.db"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(splits.stat().st_mode) == 0o700
    place.restart()
    assert place.texts(make()) == texts and (splits / "key").read_bytes() == key

    (splits / "key").unlink()
    place.restart()
    with refuses(LedgerError, "key-or-book-gone") as caught:
        place.at_site.rows(make(), SITE)
    assert str(splits / "key") in str(caught.value)
    assert place.ask(make(), "join", round=0).header.error == "ledger" and not (splits / "key").exists()
    (splits / "key").write_bytes(bytes(32))
    with refuses(LedgerError, "another-key"):
        place.at_site.rows(make(), SITE)
    (splits / "key").write_bytes(key[:7])
    with refuses(LedgerError, "no-key") as caught:
        place.at_site.rows(make(), SITE)
    assert "7 bytes" in str(caught.value)
    (splits / "key").write_bytes(key)
    assert place.texts(make()) == texts


def test_a_ledger_that_has_spent_wants_the_key_too(place: Place, make: Any) -> None:
    """The whole folder is gone: put back from a copy without it, or of a release that had none."""
    assert place.ask(make(privacy=PRIVATE)).header.error is None
    for path in (place.folder.state / "splits").iterdir():
        path.unlink()
    place.restart()
    with refuses(LedgerError, "key-or-book-gone") as caught:
        place.at_site.rows(make(), SITE)
    assert str(place.folder.state / "splits" / "key") in str(caught.value)
    (place.folder.state / "splits" / "anew").touch()  # as docs/data.md says, on purpose
    assert place.texts(make())["train"]


@pytest.mark.parametrize("lost", ["gone", "no bytes", "no rows"])
def test_a_ledger_that_has_spent_wants_the_book_too(place: Place, make: Any, lost: str) -> None:
    assert place.ask(make(privacy=PRIVATE)).header.error is None
    splits = place.folder.state / "splits"
    book, key = splits / "trained.db", (splits / "key").read_bytes()
    if lost == "gone":
        book.unlink()
    elif lost == "no bytes":
        book.write_bytes(b"")
    else:
        with closing(sqlite3.connect(book)) as db, db:
            db.execute("DELETE FROM trained")
    for _ in range(2):  # that it was looked for does not make it there
        place.restart()
        for looks_only in (False, True):
            data = SiteData(place.folder, looks_only=True) if looks_only else place.at_site
            with refuses(LedgerError, "key-or-book-gone") as caught:
                data.rows(make(), SITE)
            assert str(book) in str(caught.value)
    assert place.ask(make(), run_id="f" * 16).header.error == "ledger"
    (splits / "anew").touch()
    assert place.texts(make())["train"] and (splits / "key").read_bytes() == key
    place.restart()
    assert place.texts(make())["train"], "it was begun anew, for good"
    assert not (splits / "anew").exists(), "and no second loss is waved through"
    with closing(sqlite3.connect(book)) as db, db:
        db.execute("DELETE FROM anew")
    place.restart()
    with pytest.raises(LedgerError):
        place.at_site.rows(make(), SITE)


def test_a_column_more_in_every_row_is_said(place: Place, make: Any, caplog: Any) -> None:
    run = make(privacy=PRIVATE)
    place.ask(run, "join", round=0)
    assert place.ask(run).header.error is None
    file = place.path / "notes.csv"
    header, *lines = file.read_text().splitlines()
    file.write_text("\n".join([header, *lines[10:]]) + "\n")  # most rows are those that it had
    place.restart()
    place.ask(run, "join", round=0, run_id="a" * 16)
    assert "on none of these rows" not in caplog.text
    file.write_text("\n".join([header + ",export", *(line + ",2026-11-28" for line in lines)]) + "\n")
    place.restart()
    place.ask(run, "join", round=0, run_id="b" * 16)
    (record,) = [each for each in caplog.records if "on none of these rows" in each.getMessage()]
    assert record.levelname == "ERROR"


def test_who_only_looks_makes_no_key(place: Place, make: Any) -> None:
    looking = SiteData(place.folder, looks_only=True)
    assert looking.rows(make(), SITE)["train"]
    assert inspect_own_data(place.folder.config, place.path, make()).ok
    assert not (place.folder.state / "splits").exists()
    texts = place.texts(make())
    rows = SiteData(place.folder, looks_only=True).rows(make(), SITE)
    assert [row.values["text"] for row in rows["train"]] == texts["train"]
