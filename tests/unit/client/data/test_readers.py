"""Files of rows: every format gives the same rows, and damage is named by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest
from refusals import refuses

from quorate.client.data.readers import describe_columns, read_source
from quorate.shared.config.sites_config import SourceConfig
from quorate.shared.errors import DataError
from quorate.shared.protocol.messages import Split
from quorate.shared.tasks.task import Row

SECRET = "Mrs Miller of 4 Mill Lane"
ROWS: list[dict[str, Any]] = [
    {"text": 'she said "no", twice', "label": "symptoms", "age": "61"},
    {"text": "two\nlines; Übelkeit", "label": "causes", "age": None},
]


def read(path: Path, **fields: Any) -> dict[Split, list[Row]]:
    return read_source(SourceConfig(source=str(path), **fields), Path("/nowhere"))


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def table(path: Path, separator: str) -> Path:
    cells = [["text", "label", "age"], *([row["text"], row["label"], row["age"] or ""] for row in ROWS)]
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in cells]
    path.write_text("".join(separator.join(row) + "\r\n" for row in quoted), encoding="utf-8-sig", newline="")
    return path


def parquet(path: Path) -> Path:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.semicolon.csv", "rows.tsv", "rows.parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    separators = {"rows.csv": ",", "rows.semicolon.csv": ";", "rows.tsv": "\t"}
    if name in separators:
        table(path, separators[name])
    else:
        parquet(path) if name.endswith("parquet") else jsonl(path, ROWS)
    splits = read(path)
    assert list(splits) == ["train"]
    assert [dict(row.values) for row in splits["train"]] == ROWS


def test_rows_know_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [row.source for row in read(path)["train"]] == [f"{path}:1", f"{path}:3"]
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"one\ntwo\nthree",a\n\nfour,b\n')
    assert [row.source for row in read(path)["train"]] == [f"{path}:2", f"{path}:6"]


def test_an_unnamed_index_column_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(",text,label\n0,good,a\n")
    assert dict(read(path)["train"][0].values) == {"text": "good", "label": "a"}


@pytest.mark.parametrize("validation", ["validation", "valid", "val", "dev", "Dev"])
def test_a_folder_has_a_file_per_split(tmp_path: Path, validation: str) -> None:
    for name in ("train", validation, "test"):
        jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    (tmp_path / "info.json").write_text("{}")
    jsonl(tmp_path / "extra.jsonl", [{"text": "not a split"}])
    splits = read(tmp_path)
    assert {split: rows[0].values["text"] for split, rows in splits.items()} == {
        "train": "train",
        "validation": validation,
        "test": "test",
    }


def test_a_folder_without_train_lists_its_files(tmp_path: Path) -> None:
    with refuses(DataError, "no-train-file") as caught:
        read(tmp_path)
    assert "nothing" in str(caught.value)
    jsonl(tmp_path / "training.jsonl", ROWS)
    with refuses(DataError, "no-train-file") as caught:
        read(tmp_path)
    assert "training.jsonl" in str(caught.value)


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", ROWS)
    jsonl(tmp_path / "val.jsonl", ROWS)
    table(tmp_path / "dev.csv", ",")
    with refuses(DataError, "two-for-one-split") as caught:
        read(tmp_path)
    assert "dev.csv and val.jsonl for validation" in str(caught.value)


JSONL_DAMAGE = {
    f'{{"text": "{SECRET}", "lab': ("not-json", f"character {len(SECRET) + 18}"),
    f'["{SECRET}"]': ("not-an-object", "list"),
    f'"{SECRET}"': ("not-an-object", "string"),
    "null": ("not-an-object", "null"),
    "17": ("not-an-object", "number"),
    "[" * 100_000: ("not-json", ""),
}


@pytest.mark.parametrize("line", JSONL_DAMAGE, ids=range(len(JSONL_DAMAGE)))
def test_damaged_json_lines(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    kind, named = JSONL_DAMAGE[line]
    with refuses(DataError, kind, f"{path}:2") as caught:
        read(path)
    assert named in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None  # json's own error holds the line


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_bytes_that_are_not_utf8(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    first = b'{"text": "fine"}\n' if name.endswith("jsonl") else b"text\n"
    path.write_bytes(first + f"{SECRET} ü".encode("latin-1") + b"\n")
    with refuses(DataError, "not-utf8", f"{path}:2") as caught:
        read(path)
    assert f"byte {len(SECRET) + 2} " in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__


CSV_DAMAGE = {
    f"text,label\nfine,a\n{SECRET}\n": ("cell-count", ":3: 1 cells under a header of 2 "),
    f"text,label\n{SECRET},b,c\n": ("cell-count", ":2: 3 cells under a header of 2 "),
    f'text,label\nfine,a\n"{SECRET},b\n': ("not-csv", ":3: "),
    f'text,label\n"{SECRET}"x,b\n': ("not-csv", ":2: "),
    f"{SECRET},1\nmore,0\n": ("header-of-numbers", ":1: "),
    "text,label,text\na,b,c\n": ("column-twice", ":1: "),
    "text,label\ra,b\r": ("not-csv", ":1: "),
    ",,\n": ("no-header", " "),
    "": ("no-header", " "),
    "text,label\n\n": ("no-rows", " "),
}


@pytest.mark.parametrize("content", CSV_DAMAGE, ids=range(len(CSV_DAMAGE)))
def test_damaged_csv(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content.encode())
    kind, after = CSV_DAMAGE[content]
    with refuses(DataError, kind) as caught:
        read(path)
    assert f"{path}{after}" in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, -20])
def test_damaged_parquet(tmp_path: Path, keep: int) -> None:
    path = parquet(tmp_path / "rows.parquet")
    path.write_bytes(path.read_bytes()[:keep])
    with refuses(DataError, "not-parquet", str(path)):
        read(path)


def test_empty_and_unknown_files(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n \n")
    with refuses(DataError, "no-rows") as caught:
        read(tmp_path / "rows.jsonl")
    assert str(tmp_path / "rows.jsonl") in str(caught.value)
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    with refuses(DataError, "unknown-ending", str(tmp_path / "rows.xlsx")) as caught:
        read(tmp_path / "rows.xlsx")
    assert ".jsonl" in str(caught.value)
    with refuses(DataError, where="source") as caught:
        read(tmp_path / "absent.csv")
    assert str(tmp_path / "absent.csv") in str(caught.value)
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "folder.csv" / "train.csv").mkdir()
    with refuses(DataError, "unreadable-file") as caught:
        read(tmp_path / "folder.csv")
    assert str(tmp_path / "folder.csv" / "train.csv") in str(caught.value)
    assert "Is a directory" in str(caught.value)


def test_long_names_are_not_shown_as_columns() -> None:
    assert describe_columns(["text", "label"]) == "text, label"
    assert describe_columns(["text", SECRET * 2, ""]) == "text, and 2 more"
    assert describe_columns([SECRET * 2]) == "1 without a usable name"


@pytest.mark.parametrize(
    ("name", "rows", "labels"), [("breast_cancer", 569, 2), ("iris", 150, 3), ("wine", 178, 3)]
)
def test_data_inside_scikit_learn(name: str, rows: int, labels: int) -> None:
    pytest.importorskip("sklearn")
    read = read_source(SourceConfig(source=f"sklearn:{name}"), Path("/nowhere"))["train"]
    assert len(read) == rows
    assert len({row.values["label"] for row in read}) == labels
    assert all(isinstance(value, float) for key, value in read[0].values.items() if key != "label")


@pytest.mark.parametrize("name", ["digits", "california_housing", "files", ""])
def test_other_loaders_of_scikit_learn_are_not_called(name: str) -> None:
    with refuses(DataError, "unknown-toy") as caught:
        read_source(SourceConfig(source=f"sklearn:{name}"), Path("/nowhere"))
    assert f"sklearn:{name} " in str(caught.value) and "breast_cancer, iris, wine" in str(caught.value)
