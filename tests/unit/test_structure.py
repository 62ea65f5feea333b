"""How the source is laid out: what a reader may take for granted of names, folders and modules."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = ("shared", "client", "server", "simulations", "deploy")
SOURCES = {
    path: ast.parse(path.read_text(encoding="utf-8"))
    for floor in FLOORS
    for path in sorted((ROOT / floor / "quorate").rglob("*.py"))
}
FOLDERS = sorted({path.parent for path in SOURCES if (path.parent / "__init__.py").exists()})
LARGEST_FOLDER = 13
"""Modules of one folder, its __init__ left out."""

SAME_IDEA = {
    "flower_app": "Flower's ClientApp and its ServerApp",
    "flower_internals": "the one module of a side that uses Flower's private names",
    "flower_messages": "one message of ours in one of Flower's, at both ends",
    "folder": "the folder that a site is, and the one that a federation is",
    "forecast": "what a run would cost, and the command that says it",
    "join": "how a site joins a run, at both ends",
    "run": "a run, and the command that submits one",
    "site": "a site, and the command that looks after one",
}
"""Names that two modules may share, because they are one idea at two ends."""

PRIVATE_OF_OTHERS = {
    "_exit": "os: how a child that was forked ends",
    "_gradient_checkpointing_func": "transformers: where a layer keeps its checkpointing",
    "_gts": "pycocotools: boxes of its evaluation",
    "_dts": "pycocotools: boxes of its evaluation",
}
"""Underscore names of libraries, Flower aside."""


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts[1:])


def test_no_two_classes_share_a_name() -> None:
    places = defaultdict(list)
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{name_of(path)}:{node.lineno}")
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_modules_that_share_a_name_are_one_idea_at_two_ends() -> None:
    places = defaultdict(list)
    for path in SOURCES:
        if path.stem != "__init__":
            places[path.stem].append(name_of(path))
    shared = {name: found for name, found in places.items() if len(found) > 1}
    assert {name: found for name, found in shared.items() if name not in SAME_IDEA} == {}
    assert set(SAME_IDEA) <= set(shared), "an exception that nothing needs any more"


def imports_of_underscore_names(tree: ast.Module) -> Iterator[str]:
    """Underscore names that are imported from our own modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "quorate":
            yield from (f"line {node.lineno}: {each.name}" for each in node.names if private(each.name))


def uses_of_foreign_underscore_names(tree: ast.Module) -> Iterator[str]:
    """Underscore names that are read off something, and that this module itself defines nowhere."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    read = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and private(node.attr):
            on_itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if on_itself:
                own.add(node.attr)
            else:
                read.append(node)
    yield from (f"line {node.lineno}: {ast.unparse(node)}" for node in read if node.attr not in own)


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_module_uses_anothers_underscore_names() -> None:
    found = {}
    for path, tree in SOURCES.items():
        used = [*imports_of_underscore_names(tree)]
        if path.stem != "flower_internals":
            used += uses_of_foreign_underscore_names(tree)
        found[name_of(path)] = [each for each in used if each.rpartition(".")[2] not in PRIVATE_OF_OTHERS]
    assert {name: used for name, used in found.items() if used} == {}


@pytest.mark.parametrize(
    "code",
    [
        "from quorate.client.site.site import _rows",
        "from quorate.client.site import site\nsite._rows()",
        "import quorate.client.site.site\nquorate.client.site.site._rows()",
        "def f(site):\n    return site._rows",
    ],
)
def test_an_underscore_name_of_another_module_is_seen(code: str) -> None:
    tree = ast.parse(code)
    assert [*imports_of_underscore_names(tree), *uses_of_foreign_underscore_names(tree)]


def test_flowers_modules_are_named_as_texts_in_the_adapters_alone() -> None:
    """What `importlib` and `python -m` are given; import-linter sees the imports proper."""
    naming = {
        path.stem
        for path, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"flwr(\.\w+)+", node.value)
    }
    assert naming == {"flower_internals"}


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_a_folder_is_small_and_says_in_a_sentence_what_it_is_for(folder: Path) -> None:
    modules = [path for path in SOURCES if path.parent == folder and path.stem != "__init__"]
    assert len(modules) <= LARGEST_FOLDER
    sentence = ast.get_docstring(SOURCES[folder / "__init__.py"])
    assert sentence and sentence.endswith(".") and not re.search(r"[.!?]\s|\n\n", sentence)


PUTS_IN_PLACE = {
    "quorate.shared.process.files": "the one way of writing a file or a folder atomically",
    "quorate.shared.process.log_keeper": "a log gives way to the next",
}


def test_what_is_written_gets_its_name_in_one_module() -> None:
    found = set()
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name, arguments = node.func.attr, len(node.args)
                # A text's replace has two arguments, a dataclass's has names.
                moves = name in ("rename", "renames") or (name == "replace" and arguments == 1)
                if (moves and not node.keywords) or name in ("mkstemp", "hardlink_to"):
                    found.add(name_of(path))
    assert found == set(PUTS_IN_PLACE)
