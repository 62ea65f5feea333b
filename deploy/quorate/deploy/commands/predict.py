"""`quorate predict`: try an adapter on a text or a file of texts, or on images."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from quorate.deploy.commands.common import JsonOption, LogLevel, LogLevelOption, configure_logging, print_json
from quorate.shared.errors import AdapterError, DataError

_ENDINGS = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")


def predict(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="An adapter folder, or the output folder of a run.")
    ],
    text: Annotated[
        str,
        typer.Argument(
            metavar="TEXT|FILE",
            help="A text; or a file with one text a line, or JSON lines with a field `text`; or - for stdin; "
            "or an image, or a folder of images.",
        ),
    ],
    as_json: JsonOption = False,
    log_level: LogLevelOption = LogLevel.warning,
) -> None:
    """Try an adapter: print the label of each text or image, with its probability.

    Example: quorate predict runs/demo "mean radius 20.6, mean texture 17.8"
    """
    configure_logging(log_level)
    folder = _adapter_folder(adapter)
    images = find_images(text)
    inputs = images or read_texts(text)
    from quorate.client.predict import predict as predict_inputs

    predictions = predict_inputs(folder, inputs, images=bool(images))
    name = "image" if images else "text"
    rows = [{name: each, **found} for each, found in zip(inputs, predictions, strict=True)]
    if as_json:
        print_json({"adapter": str(folder), "predictions": rows})
    else:
        _print_table(rows)


def find_images(text: str) -> list[str]:
    """Return the image that TEXT|FILE names, or all images in the folder it names; none if it names neither.

    Raises: DataError: a folder without an image.
    """
    from quorate.shared.tasks.images import IMAGE_SUFFIXES

    if text.lower().endswith(IMAGE_SUFFIXES) and os.path.isfile(text):  # noqa: PTH113 - as in read_texts
        return [text]
    if not os.path.isdir(text):  # noqa: PTH112 - as in read_texts
        return []
    found = sorted(str(p) for p in Path(text).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise DataError(f"{text}: the folder holds no image ({', '.join(IMAGE_SUFFIXES)}).")
    return found


def read_texts(text: str) -> list[str]:
    """Return the texts that TEXT|FILE stands for.

    Raises: DataError: naming file and line, never quoting it: an unreadable file, a line that is not an
        object with `text`, or no text at all.
    """
    if text == "-":
        return _texts_of(sys.stdin.buffer.read(), "stdin", jsonl=False)
    if not os.path.isfile(text):  # noqa: PTH113 - Path.is_file raises on a text longer than a file name
        if text.endswith(_ENDINGS) and len(text.split()) == 1:
            raise DataError(f"{text}: there is no such file; check the path.")
        return _texts_of(text.replace("\n", " ").encode(), "TEXT", jsonl=False)
    path = Path(text)
    if path.suffix not in (".jsonl", ".json", ".txt", ""):
        raise DataError(f"{path}: give one text a line (.txt), or JSON lines with a field `text` (.jsonl).")
    try:
        return _texts_of(path.read_bytes(), str(path), jsonl=path.suffix in (".jsonl", ".json"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from error


def _texts_of(content: bytes, where: str, *, jsonl: bool) -> list[str]:
    try:
        lines: Iterable[str] = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} is not UTF-8; save the file as UTF-8 text.") from error
    texts = [
        _text_field(line, f"{where}:{number}") if jsonl else line.strip()
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not texts:
        raise DataError(f"{where}: holds no text; give at least one.")
    return texts


def _text_field(line: str, where: str) -> str:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: is not JSON; give one object a line.") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not row["text"].strip():
        raise DataError(f"{where}: has no field `text` that holds a text.")
    return str(row["text"])


def _adapter_folder(folder: Path) -> Path:
    for candidate in (folder, folder / "adapter"):
        if (candidate / "adapter_config.json").is_file():
            return candidate
    raise AdapterError(
        f"{folder}: holds no adapter (no adapter_config.json); name the adapter folder of a run."
    )


def _objects(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Return a row per object found, for the table; an image without one keeps a row."""
    return [
        {
            name: f"{', '.join(f'{figure:.0f}' for figure in each['box'])} in {row[name]}",
            "label": each["label"],
            "scores": {each["label"]: each["score"]},
        }
        for row in rows
        for each in row["objects"]
    ] + [{name: row[name], "labels": [], "scores": {}} for row in rows if not row["objects"]]


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    from quorate.deploy.terminal import stdout_console

    name = next(iter(rows[0]))
    if "objects" in rows[0]:
        rows = _objects(rows, name)
    numbers = "value" in rows[0]
    table = Table(*(("value",) if numbers else ("label", "probability")), name, box=SIMPLE)
    for row in rows:
        shown = row[name] if len(row[name]) <= 70 else row[name][:67] + "..."
        if numbers:
            table.add_row(f"{row['value']:.6g}", Text(shown))
            continue
        labels = row["labels"] if "labels" in row else [row["label"]]
        scores = ", ".join(f"{row['scores'][label]:.3f}" for label in labels)
        table.add_row(Text(", ".join(labels) or "(none)"), scores, Text(shown))
    stdout_console().print(table)
