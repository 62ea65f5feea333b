"""What stays in a site process's memory: the rows of the run in hand, and no others."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import yaml
from engines import answer_all
from site_folder import SITE, request, sha256_of, write_folder

from quorate.client.node.folder import SiteFolder
from quorate.client.site.site import Site
from quorate.client.site.site_data import SiteData
from quorate.shared.tasks.task import Example


@pytest.fixture
def folder(tmp_path: Path, tiny_bert: Path) -> SiteFolder:
    """A site with the same rows under two aliases."""
    write_folder(tmp_path, tiny_bert)
    path = tmp_path / "site.yaml"
    content = yaml.safe_load(path.read_text())
    content["data"]["letters"] = content["data"]["notes"]
    path.write_text(yaml.safe_dump(content))
    return SiteFolder.find(tmp_path)


def test_rows_and_examples_of_other_runs_are_let_go_of(
    folder: SiteFolder, tiny_bert: Path, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"model_name_or_path": "/nowhere", "sha256": sha256_of(tiny_bert)}
    held = SiteData(folder)
    site = Site(held)
    encoded: list[tuple[str, weakref.ref[Example]]] = []
    encode = type(make_run().task).encode

    def noting(self: Any, rows: Any, processor: Any) -> list[Example]:
        examples = encode(self, rows, processor)
        encoded.extend((alias, weakref.ref(example)) for example in examples)
        return examples

    monkeypatch.setattr(type(make_run().task), "encode", noting)
    first = None
    for alias, few in (("notes", None), ("letters", None), ("letters", 2), ("notes", None)):
        run = make_run(data=alias, model=model, training={"examples_per_class": few})
        (joined,) = answer_all(site, [request(run, "join", 0, run_id=f"{len(encoded):016x}")])
        assert joined.header.error is None and joined.header.description is not None
        rows = held.rows(run, SITE)
        gc.collect()
        alive = {name for name, example in encoded if example() is not None}
        assert alive == {alias}
        assert sum(example() is not None for _, example in encoded) == sum(
            joined.header.description.rows.values()
        )
        kept = rows["train"][0]
        first = first or kept
        assert first == kept, "the same rows each time"
        assert held.rows(run, SITE)["train"][0] is kept, "read once for a run"
