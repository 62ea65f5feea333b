"""docs/events.md: its table names every event and field that there is, and its code runs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from bad_input import workplace

from quorate.server.tracking.events import Event
from quorate.server.tracking.records import Record

TEXT = (Path(__file__).parents[2] / "docs" / "events.md").read_text(encoding="utf-8")
KINDS: tuple[type[Record], ...] = get_args(get_args(Event)[0])
COMMON = {"version", "at", "event"}


@pytest.fixture
def folder(tmp_path: Path, tiny_bert: Path) -> Iterator[Path]:
    with workplace(tmp_path, tiny_bert) as folder:
        for ending in ("yaml", "sites.yaml"):
            shutil.copy(f"tiny.{ending}", f"triage.{ending}")
        yield folder


def test_the_table_has_every_event_and_its_fields() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| .*? \| (.*) \|$", TEXT, re.MULTILINE)
    assert {(kind, name) for kind, name, _ in rows} == {
        (each.model_fields["event"].default, each.__name__) for each in KINDS
    }
    fields = {name: set(re.findall(r"`([\w.]+)`", text)) for _, name, text in rows}
    for each in KINDS:
        assert each.model_fields.keys() - COMMON <= fields[each.__name__], each
        assert all(field.description for field in each.model_fields.values())
    assert all(f"`{name}`" in TEXT for name in COMMON)


def test_the_code_runs_and_shows_what_it_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    notebook, reader = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(notebook, names)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["1", "2"]
    assert names["summary"].rounds == 2
    exec(reader, names)
    said = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert said.count("round") == 2 and said[-1] == "finish"
