"""Every path and name in docs/architecture.md is there, and every folder of the source is in it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PORTIONS = ("client", "deploy", "server", "shared", "simulations")
NAMED = re.findall(r"`([a-z]+/[a-z_./-]*)(?:::([\w.]+))?`", PAGE)
"""(path, name in it) of everything in backquotes that has the form of a path."""


def found(path: str) -> Path | None:
    """The file or folder: from the root, or inside a portion (`server/rounds/loop.py`)."""
    portion, _, rest = path.partition("/")
    places = [ROOT / path]
    if portion in PORTIONS:
        places.append(ROOT / portion / "quorate" / portion / rest)
    return next((place for place in places if place.exists()), None)


def names(file: Path) -> set[str]:
    """Functions, classes and variables of a module, and methods and fields of its classes."""

    def of(body: list[ast.stmt], before: str = "") -> set[str]:
        there: set[str] = set()
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                there.add(before + node.name)
                if isinstance(node, ast.ClassDef):
                    there |= of(node.body, f"{before}{node.name}.")
            elif isinstance(node, ast.Assign):
                there |= {before + each.id for each in node.targets if isinstance(each, ast.Name)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                there.add(before + node.target.id)
        return there

    return of(ast.parse(file.read_text(encoding="utf-8")).body)


PATHS = sorted(set(NAMED))


def test_the_page_names_many() -> None:
    assert len(PATHS) > 60, PATHS


@pytest.mark.parametrize(("path", "name"), PATHS, ids=lambda each: each or "-")
def test_a_path_or_name_is_there(path: str, name: str) -> None:
    file = found(path)
    assert file is not None, f"there is no {path}"
    if name:
        assert name in names(file), f"{path} has no {name}"


def test_a_round_reads_as_nine_steps_on_one_screen() -> None:
    text = (ROOT / "server/quorate/server/rounds/loop.py").read_text(encoding="utf-8")
    (round_,) = [
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name == "run_round"
    ]
    lines = text.splitlines()[round_.lineno - 1 : round_.end_lineno]
    comments = [line.partition("  # ")[2] for line in lines]
    steps = [int(step) for comment in comments for step in re.findall(r"(?:^|, )(\d) ", comment)]
    assert steps == list(range(1, 10))
    assert len(lines) <= 60


def test_every_folder_of_the_source_is_on_the_page() -> None:
    for portion in PORTIONS:
        base = ROOT / portion / "quorate" / portion
        for file in base.rglob("__init__.py"):
            below = file.parent.relative_to(base).as_posix()
            folder = f"{portion}/" if below == "." else f"{portion}/{below}/"
            docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            assert f"| `{folder}` | {docstring.splitlines()[0]} |" in PAGE, folder
