"""From a source's columns to a task's: texts, labels, splits."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from refusals import refuses

from quorate.client.data.splits import LoadedRow, load_splits
from quorate.shared.config.sites_config import SourceConfig
from quorate.shared.errors import ConfigError, DataError

SECRET = "Mrs Miller of 4 Mill Lane has had a cough for three weeks now"
LABELS = ("symptoms", "causes", "exams and tests")
Raw = list[dict[str, Any]] | str


def load(folder: Path, rows: Raw, run_labels: tuple[str, ...] = LABELS, **fields: Any) -> list[LoadedRow]:
    """Write rows (JSON lines, or the text of a CSV file) and load them, none held back."""
    file = folder / ("rows.csv" if isinstance(rows, str) else "rows.jsonl")
    file.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(source=file.name, split={"validation": 0, "test": 0}, **fields)
    splits = load_splits(source, folder, {"text": "text", "label": "label"}, run_labels)
    assert not splits["validation"]
    assert not splits["test"]
    return splits["train"]


def labelled(*values: Any) -> Raw:
    return [{"text": SECRET, "label": value} for value in values]


def ids(rows: list[LoadedRow]) -> list[Any]:
    return [row.values["label"] for row in rows]


def test_rows_have_the_tasks_columns_and_keep_their_own(tmp_path: Path) -> None:
    raw = {"question": "why?", "kind": "causes", "site": "north"}
    rows = load(tmp_path, [raw], columns={"text": "question", "label": "kind"})
    assert rows == [LoadedRow({"text": "why?", "label": 1}, f"{tmp_path}/rows.jsonl:1", raw)]


def test_a_template_writes_the_text(tmp_path: Path) -> None:
    csv = "age,sugar,label\n61,,causes\n40.4,7.25,symptoms\n"
    rows = load(tmp_path, csv, template="age {age:.0f}[[, sugar {sugar:.1f}]]")
    assert [row.values["text"] for row in rows] == ["age 61", "age 40, sugar 7.2"]


@pytest.mark.parametrize(
    ("values", "mapping", "expected"),
    [
        (["causes", " symptoms ", "exams and tests"], {}, [1, 0, 2]),
        ([0, 1, 2, 1.0, "2"], {}, [0, 1, 2, 1, 2]),
        (["K", "S", "causes"], {"K": "causes", "S": "symptoms"}, [1, 0, 1]),
        ([1, "2", 1.0], {1: "symptoms", "2": "causes"}, [0, 1, 0]),
        ([True, False], {True: "symptoms", "false": "causes"}, [0, 1]),
        ([0, "x"], {"x": "exams and tests"}, [0, 2]),
        ([["causes", "symptoms"], [], ["K"], [2, 0, 0]], {"K": "causes"}, [[0, 1], [], [1], [0, 2]]),
    ],
)
def test_labels(tmp_path: Path, values: list[Any], mapping: dict[Any, str], expected: list[Any]) -> None:
    assert ids(load(tmp_path, labelled(*values), labels=mapping)) == expected


def test_a_csv_cell_holds_a_number_a_name_or_a_list(tmp_path: Path) -> None:
    csv = 'text,label\na,2\nb,causes\nc,"[""causes"", 0]"\n'
    assert ids(load(tmp_path, csv)) == [2, 1, [0, 1]]
    with refuses(DataError, "labels-not-json", f"{tmp_path}/rows.csv:2") as caught:
        load(tmp_path, "text,label\na,[causes; symptoms\n")
    assert "column 'label'" in str(caught.value)


@pytest.mark.parametrize("value", [3, -1, "3", "cause", "Causes", 1.5, True, ["causes", "cause"]])
def test_an_unknown_label_is_named(tmp_path: Path, value: Any) -> None:
    shown = {"['causes', 'cause']": "cause", "True": "true"}.get(str(value), str(value))
    with refuses(DataError, "unknown-label", f"{tmp_path}/rows.jsonl:2") as caught:
        load(tmp_path, labelled("causes", value))
    said = str(caught.value)
    assert all(fact in said for fact in ("column 'label'", f"'{shown}'", ", ".join(LABELS), "`labels`"))
    assert SECRET not in said


def test_a_text_taken_for_a_label_is_not_quoted(tmp_path: Path) -> None:
    with refuses(DataError, "unknown-label", f"{tmp_path}/rows.jsonl:1") as caught:
        load(tmp_path, labelled("causes"), columns={"label": "text"})
    assert "column 'text'" in str(caught.value) and "61 characters" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_number_that_a_mapping_leaves_out_is_not_an_id(tmp_path: Path) -> None:
    with refuses(DataError, "unknown-label", f"{tmp_path}/rows.jsonl:3") as caught:
        load(tmp_path, labelled(1, 2, 0), labels={1: "symptoms", 2: "causes"})
    assert "label '0'" in str(caught.value)


def test_a_number_that_is_name_and_id_is_refused(tmp_path: Path) -> None:
    stars = ("1", "2", "3")
    with refuses(DataError, "ambiguous-label", f"{tmp_path}/rows.jsonl:1") as caught:
        load(tmp_path, labelled(2), stars)
    assert "column 'label'" in str(caught.value) and "label number 2" in str(caught.value)
    assert ids(load(tmp_path, labelled(1, "2"), stars, labels={"1": "1", "2": "2"})) == [0, 1]
    assert ids(load(tmp_path, labelled(0, "1"), ("0", "1"))) == [0, 1]


@pytest.mark.parametrize("value", [None, float("nan"), "", "  ", [None]])
def test_a_null_label_is_named(tmp_path: Path, value: Any) -> None:
    with refuses(DataError, "no-label", f"{tmp_path}/rows.jsonl:2") as caught:
        load(tmp_path, labelled("causes", value))
    assert "column 'label'" in str(caught.value)


@pytest.mark.parametrize("value", [None, float("nan"), "", " \n"])
def test_an_empty_text_is_named(tmp_path: Path, value: Any) -> None:
    with refuses(DataError, "empty-cell", f"{tmp_path}/rows.jsonl:1") as caught:
        load(tmp_path, [{"words": value, "label": 0}], columns={"text": "words"})
    assert "column 'words'" in str(caught.value)


@pytest.mark.parametrize(("value", "kind"), [(5, "int"), (["a"], "list"), ({"a": 1}, "dict")])
def test_a_text_is_a_text(tmp_path: Path, value: Any, kind: str) -> None:
    with refuses(DataError, "not-a-text", f"{tmp_path}/rows.jsonl:1") as caught:
        load(tmp_path, [{"text": value, "label": 0}])
    assert all(fact in str(caught.value) for fact in ("column 'text'", f" {kind}", "`template`"))


def test_a_missing_column_lists_those_there_are(tmp_path: Path) -> None:
    rows = [{"texte": SECRET, "label": 0, "site": "north"}]
    with refuses(DataError, "column-missing", f"{tmp_path}/rows.jsonl:1") as caught:
        load(tmp_path, rows)
    assert "column 'text'" in str(caught.value) and "texte, label, site" in str(caught.value)
    assert SECRET not in str(caught.value)
    with refuses(DataError, "cell-missing", f"{tmp_path}/rows.jsonl:2") as caught:
        load(tmp_path, [{"text": "a", "label": 0}, {"texte": SECRET, "label": 0}])
    assert "column 'text'" in str(caught.value) and "texte, label" in str(caught.value)


def test_a_misspelt_column_is_found_even_where_it_may_be_left_out(tmp_path: Path) -> None:
    with refuses(DataError, "column-missing") as caught:
        load(tmp_path, "age,sugar,label\n61,7,causes\n", template="{age}[[, {sugr}]]")
    assert "column 'sugr'" in str(caught.value) and "age, sugar, label" in str(caught.value)


def test_mappings_that_do_not_fit_the_run(tmp_path: Path) -> None:
    with refuses(ConfigError, where="columns.txt") as caught:
        load(tmp_path, labelled(0), columns={"txt": "text"})
    assert "text, label" in str(caught.value)
    with refuses(ConfigError, where="labels") as caught:
        load(tmp_path, labelled(0), labels={"K": "cause"})
    assert "'K'" in str(caught.value) and "'cause'" in str(caught.value)
    source = SourceConfig(source="rows.jsonl", template="{text}")
    with refuses(ConfigError, "no-text-column"):
        load_splits(source, tmp_path, {"tokens": "tokens", "ner_tags": "tags"}, ())


@pytest.mark.parametrize(
    ("fields", "place", "kind", "named"),
    [
        ({"template": "{a}", "columns": {"text": "b"}}, (), "value_error", "columns.text"),
        ({"labels": {1: "a", "1": "b"}}, ("labels",), "value_error", ""),
        ({"revision": "main"}, (), "value_error", "revision"),
        ({"split": {"validation": 0.5, "test": 0.5}}, ("split",), "value_error", ""),
        ({"split": {"test": 1.0}}, ("split", "test"), "less_than", "1"),
    ],
)
def test_sources_that_contradict_themselves(
    fields: dict[str, Any], place: tuple[str, ...], kind: str, named: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        SourceConfig(source="rows.csv", **fields)
    (found,) = caught.value.errors()
    assert (found["loc"], found["type"]) == (place, kind) and named in found["msg"]


def many(count: int) -> Raw:
    """Rows of which a tenth are `exams and tests`, three tenths `causes`, the rest `symptoms`."""
    kinds = ["exams and tests"] + ["causes"] * 3 + ["symptoms"] * 6
    return [{"text": f"row {index}", "label": kinds[index % 10]} for index in range(count)]


def split_file(folder: Path, raw: Raw, **split: Any) -> dict[str, list[LoadedRow]]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in raw))
    source = SourceConfig(source="rows.jsonl", split=split)
    return dict(load_splits(source, folder, {"text": "text", "label": "label"}, LABELS))


def test_one_file_is_split_by_share(tmp_path: Path) -> None:
    splits = split_file(tmp_path, many(1000), validation=0.15, test=0.2)
    for name, share in (("validation", 0.15), ("test", 0.2), ("train", 0.65)):
        counts = Counter(ids(splits[name]))
        for label, rows in ((0, 600), (1, 300), (2, 100)):
            spread = (rows * share * (1 - share)) ** 0.5
            assert abs(counts[label] - rows * share) <= 4 * spread, (name, label)


def test_a_split_that_chance_leaves_without_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    splits = split_file(tmp_path, many(2), validation=0.01, test=0.01)
    assert len(splits["train"]) == 2 and "no row of 2 lies in validation and test" in caplog.text
    with refuses(DataError, "nothing-to-train-on"):
        split_file(tmp_path, many(2), validation=0.499, test=0.5)


def test_a_split_holds_every_row_once_in_order_and_again_the_same(tmp_path: Path) -> None:
    first = split_file(tmp_path, many(97))
    lines = [int(row.source.rsplit(":", 1)[1]) for rows in first.values() for row in rows]
    assert sorted(lines) == list(range(1, 98))
    for rows in first.values():
        assert [row.source for row in rows] == sorted(
            (row.source for row in rows), key=lambda source: int(source.rsplit(":", 1)[1])
        )
    assert split_file(tmp_path, many(97)) == first
    assert split_file(tmp_path, many(97), seed=1) != first


def test_only_the_splits_without_a_file_are_taken_from_training(tmp_path: Path) -> None:
    for name in ("train", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in many(100))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    splits = load_splits(SourceConfig(source="."), tmp_path, {"text": "text", "label": "label"}, LABELS)
    assert len(splits["test"]) == 100 and 3 < len(splits["validation"]) < 30
    assert len(splits["train"]) + len(splits["validation"]) == 100
    assert all("train.jsonl" in row.source for name in ("train", "validation") for row in splits[name])
    assert all("test.jsonl" in row.source for row in splits["test"])
