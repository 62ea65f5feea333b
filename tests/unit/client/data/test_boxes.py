"""Boxes at a site: every layout gives the same rows; what is no box is named by file, image and object."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from refusals import refuses

from quorate.client.data.splits import load_splits
from quorate.shared.config.sites_config import SourceConfig
from quorate.shared.errors import DataError
from quorate.shared.tasks.task import Kind

COLUMNS: dict[str, Kind] = {"image": "image", "objects": "objects"}
LABELS = ("cat", "dog")
# image -> (category, box)
SHOWN: dict[str, list[tuple[str, list[float]]]] = {
    "a.png": [("cat", [1, 2, 3, 4]), ("dog", [0.5, 0, 9, 7.5])],
    "b.png": [],
    "c.png": [("dog", [2, 2, 2, 2])],
}
WANTED = {
    "a.png": [(0, 1.0, 2.0, 3.0, 4.0), (1, 0.5, 0.0, 9.0, 7.5)],
    "b.png": [],
    "c.png": [(1, 2.0, 2.0, 2.0, 2.0)],
}
NO_SPLIT: dict[str, Any] = {"split": {"validation": 0, "test": 0}}


def load(source: Path, **fields: Any) -> dict[str, dict[str, Any]]:
    """Each split's objects by the image's name."""
    config = SourceConfig(source=str(source), **{**NO_SPLIT, **fields})
    splits = load_splits(config, Path("/nowhere"), COLUMNS, LABELS)
    assert all(Path(row.values["image"]).is_file() for rows in splits.values() for row in rows)
    return {
        split: {Path(row.values["image"]).name: row.values["objects"] for row in rows}
        for split, rows in splits.items()
        if rows
    }


def pictures(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in SHOWN:
        Image.new("RGB", (12, 10)).save(folder / name)
    return folder


def coco() -> dict[str, Any]:
    """Ids begin where they like, and categories are in another order than the run's labels."""
    numbers = {name: 70 + index for index, name in enumerate(SHOWN)}
    return {
        "images": [{"id": numbers[name], "file_name": name, "ward": "north"} for name in SHOWN],
        "categories": [{"id": 4, "name": "dog"}, {"id": 9, "name": "cat"}],
        "annotations": [
            {"id": i, "image_id": numbers[name], "category_id": 4 if label == "dog" else 9, "bbox": box}
            for i, (name, label, box) in enumerate((n, *each) for n, found in SHOWN.items() for each in found)
        ],
    }


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("train.coco.json", "train"),
        ("train/_annotations.coco.json", "train"),
        ("annotations/instances_train2017.json", "train2017"),
        ("instances_train.json", "train"),
        ("train.coco.json", "images"),
    ],
)
def test_coco_files_beside_their_images(tmp_path: Path, file: str, images: str) -> None:
    pictures(tmp_path / images)
    path = write(tmp_path / file, coco())
    assert load(tmp_path) == {"train": WANTED}
    assert load(path) == {"train": WANTED}, "one file by itself"


def test_coco_splits_and_an_images_own_columns(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        pictures(tmp_path / split)
        write(tmp_path / f"{split}.coco.json", coco())
    assert load(tmp_path) == {"train": WANTED, "validation": WANTED, "test": WANTED}
    rows = load_splits(SourceConfig(source=str(tmp_path)), Path("/nowhere"), COLUMNS, LABELS)["test"]
    assert {row.raw["ward"] for row in rows} == {"north"}, "for partitions by column"
    write(tmp_path / "annotations" / "instances_val.json", coco())
    with refuses(DataError, "two-for-one-split") as caught:
        load(tmp_path)
    assert "validation" in str(caught.value)


@pytest.mark.parametrize("kind", ["names", "numbers", "list", "csv"])
def test_metadata_as_hugging_face_has_it(tmp_path: Path, kind: str) -> None:
    pictures(tmp_path / "train")
    rows = []
    for name, found in SHOWN.items():
        boxes, labels = [box for _, box in found], [label for label, _ in found]
        objects: Any = {"bbox": boxes, "categories": labels}
        if kind == "numbers":
            objects = {"bbox": boxes, "category": [LABELS.index(label) for label in labels]}
        if kind == "list":
            objects = [{"bbox": box, "category": label} for label, box in found]
        rows.append({"file_name": name, "objects": objects})
    if kind == "csv":
        cells = [json.dumps(row["objects"]).replace('"', '""') for row in rows]
        lines = [f'{row["file_name"]},"{cell}"' for row, cell in zip(rows, cells, strict=True)]
        (tmp_path / "train" / "metadata.csv").write_text("\n".join(["file_name,objects", *lines]) + "\n")
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "train" / "metadata.jsonl").write_text(text)
    assert load(tmp_path) == {"train": WANTED}


def test_categories_are_mapped_as_labels_are(tmp_path: Path) -> None:
    pictures(tmp_path / "train")
    data = coco()
    data["categories"][0]["name"] = "hound"
    write(tmp_path / "train.coco.json", data)
    assert load(tmp_path, labels={"hound": "dog"}) == {"train": WANTED}
    with refuses(DataError, "unknown-label", str(tmp_path / "train.coco.json")) as caught:
        load(tmp_path)
    assert ": image a.png: column 'objects', object 2: label 'hound'" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "kind", "facts"),
    [
        (
            lambda d: d["annotations"][0].update(bbox=[1, 2, -3, 4]),
            "box-size",
            ["image a.png", "object 1", " -3 "],
        ),
        (
            lambda d: d["annotations"][1].update(bbox=[1, 2, 3, 0]),
            "box-size",
            ["image a.png", "object 2", " 0 "],
        ),
        (
            lambda d: d["annotations"][1].update(bbox=[1, 2, float("nan"), 3]),
            "box-figures",
            ["object 2"],
        ),
        (lambda d: d["annotations"][1].update(bbox=[1, 2, 3]), "box-figures", ["object 2"]),
        (lambda d: d["annotations"][1].pop("bbox"), "box-figures", ["object 2"]),
        (
            lambda d: d["annotations"][2].update(image_id=5),
            "image-not-listed",
            ["annotation 2 ", "image 5,"],
        ),
        (
            lambda d: d["annotations"][2].update(category_id=5),
            "category-not-listed",
            ["annotation 2 ", "category 5,"],
        ),
        (lambda d: d["images"][1].update(id=70), "image-id-twice", ["id 70 "]),
        (
            lambda d: d["images"][1].update(file_name="gone.png"),
            "image-not-there",
            ["image gone.png: ", "/gone.png"],
        ),
        (lambda d: d["images"][1].pop("file_name"), "no-file-name", ["image 71 "]),
        (lambda d: d.pop("annotations"), "coco-no-list", ["'annotations'"]),
        (lambda d: d.update(images=[]), "coco-empty-list", ["'images'"]),
    ],
)
def test_what_is_wrong_in_a_coco_file_is_named(
    tmp_path: Path, change: Any, kind: str, facts: list[str]
) -> None:
    pictures(tmp_path / "train")
    data = coco()
    change(data)
    write(tmp_path / "train.coco.json", data)
    with refuses(DataError, kind) as caught:
        load(tmp_path)
    assert all(fact in str(caught.value) for fact in ["train.coco.json", *facts]), str(caught.value)


def test_a_file_that_is_no_coco_file(tmp_path: Path) -> None:
    path = tmp_path / "train.coco.json"
    for text, kind in (('{"images": [', "coco-not-json"), ("[]", "coco-no-object")):
        path.write_text(text)
        with refuses(DataError, kind) as caught:
            load(tmp_path)
        assert str(path) in str(caught.value)


def test_crowds_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures(tmp_path / "train")
    data = coco()
    data["annotations"].append(
        {"id": 9, "image_id": 70, "category_id": 4, "bbox": [0, 0, 9, 9], "iscrowd": 1}
    )
    write(tmp_path / "train.coco.json", data)
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path) == {"train": WANTED}
    assert "1 crowd regions are left out" in caplog.text


@pytest.mark.parametrize(
    ("objects", "kind"),
    [
        ({"bbox": [[1, 1, 2, 2]], "categories": []}, "boxes-and-categories"),
        ({"bbox": [[1, 1, 2, 2]]}, "no-categories"),
        ({"bbox": [], "category": [], "label": []}, "no-categories"),
        ({"boxes": []}, "no-boxes"),
        (3, "no-boxes"),
        ("[oops", "objects-not-json"),
        (None, "empty-cell"),
    ],
)
def test_objects_of_another_form_are_refused(tmp_path: Path, objects: Any, kind: str) -> None:
    pictures(tmp_path / "train")
    row = {"file_name": "a.png", "objects": objects}
    (tmp_path / "train" / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    with refuses(DataError, kind, f"{tmp_path}/train/metadata.jsonl:1") as caught:
        load(tmp_path)
    assert "column 'objects'" in str(caught.value)


def test_both_forms_of_the_real_images_say_the_same(tmp_path: Path) -> None:
    root = os.environ.get("QUORATE_DATA")
    if not root or not (Path(root) / "bccd_detection").is_dir():
        pytest.skip("QUORATE_DATA has no bccd_detection")
    folder = Path(root) / "bccd_detection"
    for split in ("train", "validation", "test"):  # the other form alone
        (tmp_path / split).symlink_to(folder / split)
    cells = ("RBC", "WBC", "Platelets")
    forms = []
    for source in (folder, tmp_path):
        splits = load_splits(SourceConfig(source=str(source)), Path("/nowhere"), COLUMNS, cells)
        forms.append(
            {
                s: {Path(r.values["image"]).name: r.values["objects"] for r in rows}
                for s, rows in splits.items()
            }
        )
    assert forms[0] == forms[1]
    info = json.loads((folder / "info.json").read_text())["splits"]
    for split, images in forms[0].items():
        assert len(images) == info[split]["images"]
        counts = Counter(cells[each[0]] for objects in images.values() for each in objects)
        assert counts == info[split]["boxes"]
