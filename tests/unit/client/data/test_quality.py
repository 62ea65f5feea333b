"""The data report: what it counts, that it goes on after bad rows, and that it quotes none."""

import io
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from refusals import refuses

from quorate.client.data.duplicates import near_pairs, shingles
from quorate.client.data.quality import MOST_NAMED, SiteReport, inspect_site, read_all
from quorate.client.data.quality_rules import inspect_images, inspect_numbers, inspect_texts
from quorate.shared.config.sites_config import SourceConfig
from quorate.shared.errors import DataError
from quorate.shared.tasks import SequenceClassification, SequenceRegression
from quorate.shared.tasks.task import Row

LABELS = ("yes", "no", "maybe")
TASK = SequenceClassification(name="sequence_classification", labels=LABELS, max_length=8)
SECRET = "Mrs Miller of 4 Mill Lane has had a cough for three weeks now"


def rows(split: str, *pairs: tuple[str, int]) -> list[Row]:
    return [
        Row({"text": text, "label": label}, f"{split}.csv:{line}")
        for line, (text, label) in enumerate(pairs, start=2)
    ]


def inspected(**splits: list[Row]) -> SiteReport:
    return inspect_site("north", splits, TASK, None)  # type: ignore[arg-type]  # names of splits


def said(report: SiteReport) -> str:
    return "\n".join(f"{each.text} | {', '.join(each.rows)}" for each in report.findings)


def test_rows_that_repeat_within_and_across_splits() -> None:
    report = inspected(
        train=rows("train", (SECRET, 0), (SECRET, 0), (SECRET.upper() + "!", 0), ("another text", 1)),
        validation=rows("val", ("a third one", 2)),
        test=rows("test", (SECRET, 0), (SECRET.replace("now", "today"), 0), ("nothing alike", 1)),
    )
    train = report.splits["train"]
    assert (train.rows, train.duplicates, train.near_duplicates) == (4, 1, 1)
    assert report.overlaps.keys() == {"test in train"}
    assert (report.overlaps["test in train"].exact, report.overlaps["test in train"].near) == (1, 1)
    assert report.disagreeing == 0
    leak = next(each for each in report.findings if each.text.startswith("test in train"))
    # Of several in train any may be named, and both kinds are.
    assert leak.rows[0].startswith("test.csv:2 = train.csv:") and "test.csv:3 ~ train.csv:" in leak.rows[1]


def test_labels_that_disagree_are_counted_across_splits() -> None:
    report = inspected(
        train=rows("train", ("one text", 0), ("one text", 1), ("two", 0)), test=rows("test", ("two", 2))
    )
    assert report.disagreeing == 4
    assert (
        "4 rows have the input of another row and another label | train.csv:2 / train.csv:3, train"
        in said(report)
    )


def test_labels_a_site_cannot_teach() -> None:
    report = inspected(
        train=rows("train", *[(f"text {n}", 0) for n in range(30)]), test=rows("test", ("x", 2))
    )
    assert report.splits["train"].labels == {"yes": 30, "no": 0, "maybe": 0}
    for words in (
        "train: no row of no, maybe",
        "test: has rows of maybe, train has none",
        "100 % of the labels are yes",
    ):
        assert words in said(report)


def test_no_training_rows_is_an_error() -> None:
    assert inspected(test=rows("test", ("x", 2))).findings[0].level == "error"


def test_near_pairs_are_those_of_comparing_everything() -> None:
    draw = random.Random(0)
    sets = [shingles(" ".join(draw.choice("abcdefg") for _ in range(draw.randint(1, 9)))) for _ in range(120)]
    sets.append(shingles("!?"))  # no word at all is near to nothing
    for threshold in (0.5, 0.8, 1.0):
        brute = {
            (i, j)
            for i, j in itertools.combinations(range(len(sets)), 2)
            if sets[i] and len(sets[i] & sets[j]) >= threshold * len(sets[i] | sets[j])
        }
        found = list(near_pairs(sets, threshold))
        assert set(found) == brute and len(found) == len(brute) > 0


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_bad_rows_are_named_and_counted_and_the_rest_is_looked_at(tmp_path: Path, name: str) -> None:
    if name.endswith("csv"):
        bad = [b"a cell too many,yes,x", b"\xff\xfe,yes", f"{SECRET},perhaps".encode(), b'"a "b" c",yes']
        good = [f"text {n},yes".encode() for n in range(40)]
        lines = [b"text,label", *bad, *good, b"no label,", b"n/a,no"]
    else:
        bad = [
            b'{"text": "cut off',
            b'["a list"]',
            b'{"text": "\xff", "label": "yes"}',
            json.dumps({"text": SECRET, "label": "perhaps"}).encode(),
        ]
        good = [json.dumps({"text": f"text {n}", "label": "yes"}).encode() for n in range(40)]
        more = [{"text": "no label", "label": None}, {"text": "n/a", "label": "no"}]
        lines = [b"", *bad, *good, *[json.dumps(each).encode() for each in more]]
    (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
    source = SourceConfig(source=name, split={"validation": 0, "test": 0})
    splits, report = read_all(source, tmp_path, TASK, "north")
    assert report.unusable == 5
    # Every bad row by its own line, in the order in which they are found: unreadable ones first.
    assert sorted(int(each.split(f"{name}:")[1].split(":")[0]) for each in report.problems) == [
        2,
        3,
        4,
        5,
        46,
    ]
    assert len(splits["train"]) == 41 and splits["train"][0].source == f"{tmp_path / name}:6"
    assert report.columns["label"].missing == 1 and report.columns["text"].placeholders == 1
    assert "Miller" not in report.model_dump_json()


def test_beyond_the_limit_bad_rows_are_only_counted(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\na,yes\n" + f"{SECRET},perhaps\n" * 30)
    _, report = read_all(SourceConfig(source="rows.csv"), tmp_path, TASK, "north")
    assert (report.unusable, len(report.problems)) == (30, MOST_NAMED)


def test_what_nothing_can_be_read_of_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("words,label\na,yes\n")
    with refuses(DataError, "column-missing") as caught:
        read_all(SourceConfig(source="rows.csv"), tmp_path, TASK, "north")
    assert "column 'text'" in str(caught.value)
    with refuses(DataError, where="source") as caught:
        read_all(SourceConfig(source="nosuch.csv"), tmp_path, TASK, "north")
    assert str(tmp_path / "nosuch.csv") in str(caught.value)


def test_damaged_characters() -> None:
    misread = "Sjögren".encode().decode("cp1252")
    texts = [misread, "Sjögren", "caf\ufffd", "bell\a", "line\nbreak", "naïve “quoted” text"]
    _, findings = inspect_texts(["text"], rows("train", *[(text, 0) for text in texts]), TASK, None)
    assert [each.rows for each in findings] == [["train.csv:4"], ["train.csv:2"], ["train.csv:5"]]


def test_texts_are_measured_in_the_models_tokens(tiny_bert: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    texts = ["heart", " ".join(["heart"] * 6), " ".join(["heart"] * 7), " ".join(["heart"] * 600)]
    facts, findings = inspect_texts(["text"], rows("train", *[(t, 0) for t in texts]), TASK, tokenizer)
    tokens = facts["tokens"]
    assert (tokens["min"], tokens["max"], tokens["cut"], tokens["share_cut"]) == (3, 602, 2, 0.5)
    assert [each.rows for each in findings] == [["train.csv:4", "train.csv:5"]]
    # What a run would see is these lengths, cut.
    lengths = [TASK.length(each) for each in TASK.encode(rows("t", *[(t, 0) for t in texts]), tokenizer)]
    assert lengths == [3, 8, 8, 8]


def test_numbers_far_from_the_rest_and_from_the_tasks_scale() -> None:
    task = SequenceRegression(name="sequence_regression", target_mean=0.0, target_scale=1.0)
    values: list[Any] = [*range(10, 30), 1000]
    members = [Row({"text": "x", "label": float(v)}, f"a.csv:{i}") for i, v in enumerate(values, start=2)]
    facts, findings = inspect_numbers(["label"], members, task, None)
    assert facts["label"]["outliers"] == 1 and facts["label"]["max"] == 1000
    assert findings[0].rows == ["a.csv:22"] and "task.target_mean" in findings[1].text
    settled = task.model_copy(update={"target_mean": 20.0, "target_scale": 6.0})
    assert inspect_numbers(["label"], members[:-1], settled, None)[1] == []


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, "PNG")
    whole = buffer.getvalue()
    Image.new("L", (10, 40)).save(tmp_path / "grey.png")
    images: list[Any] = [
        whole,
        str(tmp_path / "grey.png"),
        whole[:45],
        b"no image",
        str(tmp_path / "nosuch.png"),
    ]
    members = [Row({"image": image}, f"a.csv:{i}") for i, image in enumerate(images)]
    facts, (broken, modes) = inspect_images(["image"], members, TASK, None)
    assert (
        facts["width"]["max"] == 30 and facts["height"]["max"] == 40 and facts["modes"] == {"RGB": 1, "L": 1}
    )
    assert broken.level == "error" and broken.rows == ["a.csv:2", "a.csv:3", "a.csv:4"]
    assert modes.level == "warning"
