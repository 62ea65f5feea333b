"""Hub data sets, as far as that goes without a hub: the library reads a local folder of the same shape."""

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from refusals import refuses

from quorate.client.data.readers.hub import _rows, read_hub
from quorate.shared.errors import DataError

FEATURES = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: train.jsonl}
  - {split: test, path: test.jsonl}
  - {split: unsupervised, path: test.jsonl}
dataset_info:
  features:
  - {name: text, dtype: string}
  - {name: label, dtype: {class_label: {names: {'0': neg, '1': pos}}}}
  - {name: tags, sequence: {class_label: {names: {'0': a, '1': b}}}}
---
"""
installed = pytest.mark.skipif(find_spec("datasets") is None, reason="the library datasets is not installed")


@pytest.mark.parametrize("name", ["../elsewhere", "csv", "", "a/b/c", "/etc"])
def test_only_organisation_and_name(name: str) -> None:
    with refuses(DataError, "not-a-hub-id"):
        read_hub(name, None)


@pytest.mark.skipif(find_spec("datasets") is not None, reason="the library datasets is installed")
def test_without_the_library() -> None:
    with refuses(DataError, "no-datasets-library") as caught:
        read_hub("org/name", None)
    assert "hub:org/name" in str(caught.value) and "pip install 'datasets>=4'" in str(caught.value)


@installed
def test_class_numbers_become_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(FEATURES)
    rows = [{"text": "good", "label": 1, "tags": [0, 1]}, {"text": "held back", "label": -1, "tags": []}]
    for name, row in zip(("train", "test"), rows, strict=True):
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    splits = read_hub("org/name", None)
    assert [(split, dict(row.values)) for split, found in splits.items() for row in found] == [
        ("train", {"text": "good", "label": "pos", "tags": ["a", "b"]}),
        ("test", {"text": "held back", "label": -1, "tags": []}),
    ]


@pytest.mark.parametrize("form", ["fields of lists", "list of fields", "sequence of fields"])
def test_categories_of_boxes_become_names(form: str) -> None:
    """Their numbers follow the data set's order too, however the features are nested."""
    category, plain = SimpleNamespace(names=["dog", "cat"]), SimpleNamespace()

    def listed(feature: Any) -> Any:
        return SimpleNamespace(feature=feature)

    fields = {"category": category, "bbox": listed(plain)}
    boxes, found = [[1, 2, 3, 4], [5, 6, 7, 8]], [1, 0]
    value: Any = {"category": found, "bbox": boxes}
    wanted: Any = {"category": ["cat", "dog"], "bbox": boxes}
    feature: Any = {name: listed(each) for name, each in fields.items()}
    if form == "sequence of fields":
        feature = listed(fields)
    if form == "list of fields":
        feature = listed(fields)
        value = [{"category": c, "bbox": b} for c, b in zip(found, boxes, strict=True)]
        wanted = [{"category": c, "bbox": b} for c, b in zip(("cat", "dog"), boxes, strict=True)]
    table = [{"image": "a.png", "objects": value}]
    (row,) = _rows(table, {"image": plain, "objects": feature}, "hub:org/name")
    assert row.values == {"image": "a.png", "objects": wanted}
