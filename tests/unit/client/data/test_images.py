"""Images at a site: every layout gives the same rows, and what cannot be opened is named by file and row."""

from __future__ import annotations

import io
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from refusals import refuses

from quorate.client.data.readers.hub import read_hub
from quorate.client.data.splits import load_splits
from quorate.shared.config.sites_config import SourceConfig
from quorate.shared.errors import DataError
from quorate.shared.tasks.task import Kind
from quorate.shared.tasks.vision.image_task import decode

COLUMNS: dict[str, Kind] = {"image": "image", "label": "label"}
LABELS = ("cat", "dog")


def picture(path: Path, shade: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (shade, 0, 255 - shade)).save(path)
    return path


def load(source: Path, **fields: Any) -> dict[str, list[tuple[int, int]]]:
    """Each split's (shade, label)."""
    splits = load_splits(SourceConfig(source=str(source), **fields), Path("/nowhere"), COLUMNS, LABELS)
    return {split: [_seen(row.values) for row in rows] for split, rows in splits.items()}


def _seen(values: Any) -> tuple[int, int]:
    pixel = decode(values["image"], "row").getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return int(pixel[0]), values["label"]


PLACES = {"train/cat/a.png": 10, "train/dog/b.png": 20, "train/dog/deep/c.bmp": 30, "val/cat/d.png": 40}
WANTED = {"train": [(10, 0), (20, 1), (30, 1)], "validation": [(40, 0)], "test": []}
NO_SPLIT: dict[str, Any] = {"split": {"validation": 0, "test": 0}}


def folder_of(tmp_path: Path) -> Path:
    for name, shade in PLACES.items():
        picture(tmp_path / name, shade)
    (tmp_path / "train/dog/._b.png").write_bytes(b"left by another system")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def rows_of(split: str) -> list[dict[str, str]]:
    names = [name for name in PLACES if name.startswith(split)]
    return [{"place": name, "label": name.split("/")[1]} for name in names]


def test_class_folders(tmp_path: Path) -> None:
    assert load(folder_of(tmp_path), **NO_SPLIT) == WANTED


def test_one_folder_of_class_folders_is_split(tmp_path: Path) -> None:
    for label in LABELS:
        for shade in range(20):
            picture(tmp_path / label / f"{shade:02}.png", shade)
    found = load(tmp_path, split={"validation": 0.2, "test": 0.25})
    assert all(len(rows) >= 4 for rows in found.values())
    assert sorted(row for rows in found.values() for row in rows) == sorted(
        (shade, label) for shade in range(20) for label in (0, 1)
    )


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_tables_of_paths_start_at_their_own_folder(tmp_path: Path, kind: str) -> None:
    folder_of(tmp_path)
    for split in ("train", "val"):
        write(tmp_path / f"{split}.{kind}", rows_of(split))
    assert load(tmp_path, columns={"image": "place"}, **NO_SPLIT) == WANTED
    one_file = load(tmp_path / f"train.{kind}", columns={"image": "place"}, **NO_SPLIT)
    assert one_file["train"] == WANTED["train"]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_with_file_names(tmp_path: Path, kind: str) -> None:
    folder_of(tmp_path)
    for split in ("train", "val"):
        rows = [
            {"file_name": row["place"].removeprefix(f"{split}/"), "label": row["label"]}
            for row in rows_of(split)
        ]
        write(tmp_path / split / f"metadata.{kind}", rows)
    assert load(tmp_path, **NO_SPLIT) == WANTED
    assert load(tmp_path / "train", **NO_SPLIT)["train"] == WANTED["train"]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("held", [True, False])
def test_parquet_with_bytes_or_paths(tmp_path: Path, held: bool) -> None:
    arrow = pytest.importorskip("pyarrow")
    folder_of(tmp_path)
    for split in ("train", "val"):
        cells = [
            {
                "bytes": (tmp_path / row["place"]).read_bytes() if held else None,
                "path": "b.png" if held else row["place"],
            }
            for row in rows_of(split)
        ]
        table = arrow.table({"image": cells, "label": [row["label"] for row in rows_of(split)]})
        pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / f"{split}.parquet")
    assert load(tmp_path, **NO_SPLIT) == WANTED


@pytest.mark.skipif(find_spec("datasets") is None, reason="the library datasets is not installed")
def test_a_hub_data_set_gives_files_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    (row, *_) = read_hub("org/name", None)["train"]
    assert set(row.values["image"]) == {"bytes", "path"} and row.values["label"] == "cat"


def test_a_missing_image_is_named_with_its_row(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("image,label\na.png,cat\n")
    with refuses(DataError, "image-not-there", f"{tmp_path}/rows.csv:2") as caught:
        load(tmp_path / "rows.csv")
    assert "column 'image'" in str(caught.value) and str(tmp_path / "a.png") in str(caught.value)
    write(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "label": "cat"}])
    with refuses(DataError, "image-not-there", f"{tmp_path}/metadata.jsonl:1") as caught:
        load(tmp_path)
    assert "column 'file_name'" in str(caught.value)
    write(tmp_path / "metadata.jsonl", [{"name": "a.png", "label": "cat"}])
    with refuses(DataError, "no-image-named", f"{tmp_path}/metadata.jsonl:1") as caught:
        load(tmp_path)
    assert "'file_name'" in str(caught.value)


def test_a_cell_that_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"image": 3, "label": "cat"}\n')
    with refuses(DataError, "not-an-image", f"{tmp_path}/rows.jsonl:1") as caught:
        load(tmp_path / "rows.jsonl")
    assert "column 'image'" in str(caught.value) and " int" in str(caught.value)
    (tmp_path / "rows.csv").write_text("image,label\n,cat\n")
    with refuses(DataError, "empty-cell", f"{tmp_path}/rows.csv:2") as caught:
        load(tmp_path / "rows.csv")
    assert "column 'image'" in str(caught.value)


def test_layouts_that_could_mean_two_things_are_refused(tmp_path: Path) -> None:
    folder_of(tmp_path)
    picture(tmp_path / "train" / "loose.png", 1)
    with refuses(DataError, "image-beside-classes") as caught:
        load(tmp_path)
    assert str(tmp_path / "train" / "loose.png") in str(caught.value)
    (tmp_path / "train" / "loose.png").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,label\ntrain/cat/a.png,cat\n")
    with refuses(DataError, "metadata-beside-splits") as caught:
        load(tmp_path)
    assert str(tmp_path / "metadata.csv") in str(caught.value) and "train, val" in str(caught.value)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "dev").mkdir()
    with refuses(DataError, "two-for-one-split") as caught:
        load(tmp_path)
    assert "dev and val" in str(caught.value)
    (tmp_path / "dev").rmdir()
    (tmp_path / "test").mkdir()
    with refuses(DataError, "no-images") as caught:
        load(tmp_path)
    assert str(tmp_path / "test") in str(caught.value)


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8))
    for kind in ("png", "jpg", "bmp"):
        path = tmp_path / f"cut.{kind}"
        noise.save(path)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        for value, named in ((str(path), str(path)), (path.read_bytes(), f"{len(whole) // 2} bytes")):
            with refuses(DataError, "damaged-image", "a.csv:7") as caught:
                decode(value, "a.csv:7")
            assert named in str(caught.value)
    (tmp_path / "text.png").write_text("not an image")
    Image.new("F", (3, 3)).save(tmp_path / "float.tif")
    for name, refused in (
        ("text.png", "unreadable-image"),
        ("gone.png", "image-not-there"),
        ("float.tif", "wide-pixels"),
    ):
        with refuses(DataError, refused, "a.csv:7") as caught:
            decode(str(tmp_path / name), "a.csv:7")
        assert str(tmp_path / name) in str(caught.value)


def test_an_image_made_to_fill_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", 1)  # 24 pixels
    for limit in (20, 10):  # Pillow warns above its limit, and raises above twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with refuses(DataError, "image-too-large", "a.csv:7"):
            decode(str(path), "a.csv:7")


def stored(image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return stream.getvalue()


def test_every_mode_becomes_rgb_without_losing_its_range() -> None:
    wide = np.array([[0, 256 * 100 + 7, 65535]], np.uint16)
    assert np.asarray(decode(stored(Image.fromarray(wide)), ""))[0].tolist() == [
        [0] * 3,
        [100] * 3,
        [255] * 3,
    ]
    grey = Image.fromarray(np.array([[0, 200]], np.uint8))
    assert np.asarray(decode(stored(grey), ""))[0].tolist() == [[0] * 3, [200] * 3]
    clear = Image.new("RGBA", (1, 1), (9, 8, 7, 0))
    assert decode(stored(clear), "").getpixel((0, 0)) == (9, 8, 7)
    palette = Image.new("RGB", (1, 1), (9, 8, 7)).convert("P")
    assert decode(stored(palette, transparency=b"\x00\x01"), "").getpixel((0, 0)) is not None
    assert decode(stored(Image.new("1", (1, 1), 1)), "").getpixel((0, 0)) == (255, 255, 255)


def test_an_image_is_turned_as_its_camera_was() -> None:
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert decode(stored(image, exif=exif), "").size == (4, 6)
