"""`quorate predict`: try an adapter on a text or a file of texts, or on images."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from quorate.deploy.commands.both.options import (
    JsonOption,
    LogLevel,
    LogLevelOption,
    adapter_folder,
    print_json,
)
from quorate.deploy.terminal import print_table
from quorate.shared.config.template import is_text
from quorate.shared.errors import DataError

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
    """Try an adapter: print what it says of each text or image, with its probability; or answers to prompts.

    Example: quorate predict runs/demo "mean radius 20.6, mean texture 17.8"
    """
    folder = adapter_folder(adapter)
    images = find_images(text)
    inputs = images or read_texts(text)
    from quorate.client.models.predictions import predict as predict_inputs

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
    from quorate.shared.tasks.vision.image_task import IMAGE_SUFFIXES

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
            raise DataError(f"{text}: there is no such file; check the path.", kind="no-such-file")
        if not is_text(text):  # bytes that are not UTF-8 come from the shell as lone surrogates
            raise DataError("TEXT: is not UTF-8; give it in a UTF-8 terminal, or in a UTF-8 file.")
        return _texts_of(text.replace("\n", " ").encode(), "TEXT", jsonl=False)
    path = Path(text)
    if path.suffix not in (".jsonl", ".json", ".txt", ""):
        message = f"{path}: give one text a line (.txt), or JSON lines with a field `text` (.jsonl)."
        raise DataError(message, kind="wrong-ending")
    try:
        return _texts_of(path.read_bytes(), str(path), jsonl=path.suffix in (".jsonl", ".json"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from error


def _texts_of(content: bytes, where: str, *, jsonl: bool) -> list[str]:
    try:
        lines: Iterable[str] = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        message = f"{where}: byte {error.start} is not UTF-8; save the file as UTF-8 text."
        raise DataError(message, kind="not-utf-8") from error
    texts = [
        _text_field(line, f"{where}:{number}") if jsonl else line.strip()
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not texts:
        raise DataError(f"{where}: holds no text; give at least one.", kind="no-text")
    return texts


def _text_field(line: str, where: str) -> str:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: is not JSON; give one object a line.", kind="text-not-json") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not row["text"].strip():
        message = f"{where}: has no field `text` that holds a text; give it one, or take the line out."
        raise DataError(message, kind="no-text-field")
    if not is_text(row["text"]):
        raise DataError(f"{where}: `text` holds half of a character (a lone \\ud800 to \\udfff); mend it.")
    return str(row["text"])


def _found(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what was said of a text or an image, each with its probability."""
    if "entities" in row:
        return [(f"{each['text']} ({each['type']})", f"{each['score']:.3f}") for each in row["entities"]]
    if "objects" in row:
        return [
            (f"{each['label']} at {_box(each['box'])}", f"{each['score']:.3f}") for each in row["objects"]
        ]
    if "value" in row:
        return [(f"{row['value']:.6g}", "")]
    labels = row["labels"] if "labels" in row else [row["label"]]
    if not labels:
        return []
    return [(", ".join(labels), ", ".join(f"{row['scores'][label]:.3f}" for label in labels))]


def _box(box: Sequence[float]) -> str:
    return ", ".join(f"{figure:.0f}" for figure in box)


def _print_table(rows: list[dict[str, Any]]) -> None:
    if "completion" in rows[0]:
        print_table(("prompt", "completion"), ((row["text"], row["completion"]) for row in rows))
        return
    name = next(iter(rows[0]))
    kinds = {"entities": "entity", "objects": "object", "value": "value"}
    what = next((kind for key, kind in kinds.items() if key in rows[0]), "label")
    shown_rows = []
    for row in rows:
        shown = row[name] if len(row[name]) <= 70 else row[name][:67] + "..."
        for found, probability in _found(row) or [("(none)", "")]:
            shown_rows.append((found, probability, shown))
            shown = ""  # once for all that was found in it
        if cut := row.get("words_cut"):
            shown_rows.append((f"(the last {cut} words are beyond max_length: not read)", "", ""))
    print_table((what, "probability", name), shown_rows)
