"""A folder with a run that works, ways to spoil it, and the command line to run it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from quorate.deploy.cli import run

TEXTS = {
    "cardiac": "heart blood rhythm pain",
    "hepatic": "liver dose drug rash",
    "pulmonary": "lung cough scan",
}
RUN = """name: tiny
task: {name: sequence_classification, labels: [cardiac, hepatic, pulmonary], max_length: 24}
data: notes
model: {model_name_or_path: "${TINY_BERT}"}
adapter: {r: 4}
training: {max_steps: 2, per_device_train_batch_size: 4, learning_rate: 1e-2}
federation: {rounds: 2, quorum: 2, grace_seconds: 0}
evaluation: {bootstrap_samples: 20}
"""
SITES = "data: {notes: {source: notes.csv, partition: {by: iid, sites: [north, south]}}}\n"
LISTED = "data: {notes: {sites: [{name: north, source: north.csv}, {name: south, source: south.csv}]}}\n"
# No two alike: rows that are lie on one side of a split.
ROWS = [(f"{text}{' pain' * number}", label) for number in range(20) for label, text in TEXTS.items()]

Spoil = Callable[[Path], Any]


class Said(NamedTuple):
    """What a command answered."""

    code: int
    out: str
    err: str


def command(*arguments: str) -> Said:
    """Call the command line with little said, as a person's terminal would show it."""
    root, out, err = logging.getLogger(), io.StringIO(), io.StringIO()
    kept, root.handlers = root.handlers, []  # pytest's own would keep the command from setting up its log
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run([*arguments, "--log-level", "warning"])
    finally:
        root.handlers = kept
    return Said(code, out.getvalue(), err.getvalue())


def csv(rows: list[tuple[str, str]]) -> str:
    """Write rows as a CSV file."""
    return "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows)


@contextlib.contextmanager
def workplace(folder: Path, model: Path) -> Iterator[Path]:
    """Make `folder` the working directory, with a run that works; the process is as before afterwards."""
    for name, content in (("tiny.yaml", RUN), ("tiny.sites.yaml", SITES), ("notes.csv", csv(ROWS))):
        (folder / name).write_text(content)
    root, ours = logging.getLogger(), logging.getLogger("quorate")
    kept, levels = dict(os.environ), (root.level, ours.level)
    os.environ["TINY_BERT"] = str(model)
    try:
        with contextlib.chdir(folder):
            yield folder
    finally:
        logging.captureWarnings(False)
        root.setLevel(levels[0])
        ours.setLevel(levels[1])
        os.environ.clear()
        os.environ.update(kept)


def assert_one_error(err: str, words: str) -> None:
    """Assert that one line was said: an error of ours that holds `words`, separated by ` | `, in order."""
    (line,) = err.splitlines()
    assert re.match(r"(\w+Error|QuorumNotMet): ", line), line
    assert "Traceback" not in line and line.endswith((".", "?"))
    place = 0
    for word in words.split(" | "):
        assert word in line[place:], f"{word!r} is not where it should be in: {line}"
        place = line.index(word, place) + len(word)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- Ways to spoil a folder


def both(*spoils: Spoil) -> Spoil:
    """One after the other."""

    def spoil(folder: Path) -> None:
        for each in spoils:
            each(folder)

    return spoil


def put(name: str, content: str | bytes) -> Spoil:
    """Write a file."""

    def spoil(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def change(name: str, old: str, new: str) -> Spoil:
    """Replace a text in a file, everywhere."""

    def spoil(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return spoil


def cut(name: str, length: int) -> Spoil:
    """Cut a file off."""

    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        assert len(content) > length
        (folder / name).write_bytes(content[:length])

    return spoil


def drop(name: str) -> Spoil:
    """Delete a file or folder."""

    def spoil(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def source(name: str, content: str | bytes) -> Spoil:
    """Take the rows from another file."""
    return both(put(name, content), change("tiny.sites.yaml", "notes.csv", name))


def line(**values: Any) -> Spoil:
    """Take the rows from JSON lines, of which the last holds `values`."""
    rows = [{"text": text, "label": label} for text, label in ROWS]
    return source("notes.jsonl", "".join(json.dumps(row) + "\n" for row in [*rows, values]))


def base(*spoils: Spoil) -> Spoil:
    """Use a copy of the base model, spoilt."""

    def spoil(folder: Path) -> None:
        shutil.copytree(os.environ["TINY_BERT"], folder / "base")
        change("tiny.yaml", '"${TINY_BERT}"', "base")(folder)
        both(*spoils)(folder / "base")

    return spoil


def setting(name: str, **values: Any) -> Spoil:
    """Change fields of a JSON file."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **values}))

    return spoil


def arrays(name: str, edit: Callable[[str, Any], tuple[str, Any]]) -> Spoil:
    """Change names and values in a safetensors file."""

    def spoil(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        found = dict(edit(*each) for each in load_file(folder / name).items())
        save_file(found, folder / name, metadata={"format": "pt"})

    return spoil
