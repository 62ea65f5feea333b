"""A row lies on its side for ever: alone, among any others, in any order; so does a group."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import refuses

from quorate.client.data.mapping import LoadedRow
from quorate.client.data.placement import Placement, content
from quorate.client.data.splits import fill_missing_splits, load_splits, measured_apart
from quorate.shared.config.sites_config import SourceConfig, SplitConfig
from quorate.shared.errors import DataError
from quorate.shared.protocol.messages import Split

SPLIT = SplitConfig()
KEY = Placement(bytes(range(32)))
cells = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text("ab. \n\u00e9", max_size=5)
)
records = st.dictionaries(st.sampled_from("abcd"), cells, max_size=4)


def row_of(number: int, group: str | None = None, label: int | None = None) -> LoadedRow:
    raw = {"text": f"note {number}", "label": number % 3 if label is None else label}
    return LoadedRow(raw, f"notes:{number}", raw, group=group)


def sides(
    rows: Sequence[LoadedRow], placing: Placement = KEY, split: SplitConfig = SPLIT
) -> dict[str, Split]:
    """Side of each row by its text; every row must be there once for each time it came in."""
    filled = fill_missing_splits({"train": list(rows)}, split, placing)
    assert sum(map(len, filled.values())) == len(rows)
    found: dict[str, Split] = {}
    for name, members in filled.items():
        for row in members:
            assert found.setdefault(row.raw["text"], name) == name, "doubles lie on one side"
    return found


@pytest.mark.parametrize("grouped", [False, True])
def test_no_row_changes_sides_over_1000_insertions_deletions_and_orders(grouped: bool) -> None:
    draw = random.Random(3)

    def new(number: int) -> LoadedRow:
        return row_of(number, f"patient {number % 40}" if grouped else None)

    rows = [new(number) for number in range(120)]
    first = dict(sides(rows))
    assert set(first.values()) == {"train", "validation", "test"}
    by_group: dict[str | None, str] = {}
    for step in range(1000):
        what = draw.randrange(4)
        if what == 0:
            rows.insert(draw.randrange(len(rows) + 1), new(120 + step))
        elif what == 1 and len(rows) > 30:
            rows.pop(draw.randrange(len(rows)))
        elif what == 2:
            rows.insert(draw.randrange(len(rows) + 1), draw.choice(rows))
        else:
            draw.shuffle(rows)
        for text, side in sides(rows).items():
            assert first.setdefault(text, side) == side, (step, text)
        for row in rows if grouped else ():
            assert by_group.setdefault(row.group, first[row.raw["text"]]) == first[row.raw["text"]]


@pytest.mark.parametrize("count", [58, 400, 1000])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_hundred_runs_with_a_row_and_a_hundred_without_measure_the_same_others(
    count: int, grouped: bool
) -> None:
    """Whether a row is there tells nobody which of the others are trained on, and which are measured.

    Everything exact that leaves a site is a figure on measured rows; so an attacker who knows all other rows,
    and the key as well, sees the same of them, run by run.
    """
    others = [row_of(number, f"patient {number % 50}" if grouped else None) for number in range(count)]
    more = row_of(count, "a patient of its own" if grouped else None)
    for run in range(100):
        placing = Placement(random.Random(run).randbytes(32))
        order = random.Random(1000 + run).sample([*others, more], count + 1)
        without = sides([row for row in order if row is not more], placing)
        with_it = sides(order, placing)
        assert with_it.pop(more.raw["text"]) in ("train", "validation", "test")
        assert with_it == without


def test_larger_shares_take_from_training_alone() -> None:
    rows = [row_of(number) for number in range(500)]
    before, after = sides(rows), sides(rows, split=SplitConfig(validation=0.3, test=0.35))
    assert all(after[text] == side for text, side in before.items() if side != "train")
    own_test = fill_missing_splits({"train": rows, "test": [row_of(900)]}, SPLIT, KEY)
    assert {row.raw["text"] for row in own_test["validation"]} == {
        text for text, side in before.items() if side == "validation"
    }, "a file for the test moves nothing into validation or out of it"


def test_another_key_is_another_split() -> None:
    rows = [row_of(number) for number in range(200)]
    assert (
        sides(rows, Placement.of_seed(0))
        == sides(rows, Placement.of_seed(0))
        != sides(rows, Placement.of_seed(1))
    )
    assert Placement.of_seed(0).fingerprint != Placement.of_seed(1).fingerprint
    assert Placement.of_seed(0).key.hex() not in repr(Placement.of_seed(0))


@given(records, records)
def test_content_is_what_a_row_says(one: dict[str, Any], other: dict[str, Any]) -> None:
    def said(row: dict[str, Any]) -> dict[str, str]:
        """As text, as a CSV file has it; columns without a value say nothing."""
        texts = {}
        for name, value in row.items():
            if isinstance(value, bool):
                texts[name] = str(value).lower()
            elif isinstance(value, float):
                texts[name] = str(int(value)) if value.is_integer() else repr(value)
            elif isinstance(value, int) or (isinstance(value, str) and value.strip()):
                texts[name] = str(value)
        return texts

    alike = said(one) == said(other)
    assert (content(one, (), "x") == content(other, (), "x")) == alike
    backwards = dict(reversed(list(one.items())))
    assert (
        content(backwards, (), "x") == content({**one, "more": None}, (), "x") == content(said(one), (), "x")
    )


def test_a_row_lies_where_it_lay_in_another_kind_of_file_and_for_another_task(tmp_path: Path) -> None:
    lines = [f"{number},note {number},{number / 4},{'ab'[number % 2]}" for number in range(60)]
    (tmp_path / "rows.csv").write_text("id,text,dose,label\n" + "\n".join(lines) + "\n")
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            f'{{"label": "{"ab"[n % 2]}", "id": {n}, "text": "note {n}", "dose": {n / 4}, "more": null}}\n'
            for n in reversed(range(60))
        )
    )
    found = []
    for name, columns, labels in (
        ("rows.csv", {"text": "text", "label": "label"}, ("a", "b")),
        ("rows.jsonl", {"text": "text", "label": "label"}, ("b", "c", "a")),
        ("rows.jsonl", {"text": "text"}, ()),
    ):
        splits = load_splits(SourceConfig(source=name), tmp_path, columns, labels, KEY)  # type: ignore[arg-type]
        found.append({name: {row.values["text"] for row in rows} for name, rows in splits.items()})
    assert found[0] == found[1] == found[2] and all(found[0].values())


def test_an_image_is_its_bytes(tmp_path: Path) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(b"one picture")
    one, other = (
        {"image": str(tmp_path / folder / "a.png"), "label": folder} for folder in ("here", "there")
    )
    digest = content(one, ["image"], "x")
    assert digest == content(other, ["image"], "x") == content({"image": b"one picture"}, ["image"], "x")
    assert digest != content({"image": b"another"}, ["image"], "x")


@given(st.sets(st.integers(0, 30)), st.lists(st.integers(0, 30), min_size=1), st.integers(0, 30))
def test_a_double_of_a_measured_row_changes_nothing(
    measured: set[int], trained: list[int], more: int
) -> None:
    """Files that a site supplies may share rows; whether the training file has one row more shows nowhere."""
    test = [row_of(number) for number in sorted(measured)]
    for extra in ([], [more]):
        rows = [row_of(number) for number in [*trained, *extra]]
        kept, units = measured_apart({"train": rows, "test": test}, KEY, (), by_group=False)
        assert kept["test"] == test
        assert [row.raw for row in kept["train"]] == [
            row.raw for row in rows if row.raw not in [t.raw for t in test]
        ]
        assert len(units) == len({row.raw["text"] for row in kept["train"]})


def test_a_group_that_is_no_text_is_an_error_of_its_line(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"t{n}", "patient": "\ud800" if n == 2 else str(n)}) for n in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    source = SourceConfig(source="rows.jsonl", columns={"group": "patient"})
    with refuses(DataError, "group-half-character", f"{tmp_path}/rows.jsonl:3") as caught:
        load_splits(source, tmp_path, {"text": "text"}, [])
    assert "column 'patient'" in str(caught.value)


@pytest.mark.parametrize("path", ["/nowhere/a.png", "/a\0b.png", "/\ud800.png"])
def test_an_image_that_cannot_be_read_is_an_error_of_its_row(path: str) -> None:
    with refuses(DataError, where="rows:7"):
        content({"image": path}, ["image"], "rows:7")
