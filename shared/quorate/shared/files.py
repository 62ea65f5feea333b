"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from quorate.shared.errors import OutputError


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` (relative name -> content) as `folder`, atomically: readers see all of it or nothing.

    An existing folder is replaced. Everything is on disk (fsync) before the name appears.

    Raises: OutputError: the disk is full, or the place cannot be written.
    """
    temporary, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    with writing(folder):
        try:
            if temporary.exists():
                shutil.rmtree(temporary)
            temporary.mkdir(parents=True)
            for name, content in files.items():
                _write_synced(temporary / name, content)
            _sync_directory(temporary)
            if folder.exists():  # aside in one step: a kill while it is deleted would leave half of it
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
            temporary.rename(folder)
            _sync_directory(folder.parent)
        finally:
            if old.exists() and not folder.exists():
                old.rename(folder)
            for left in (temporary, old):  # on a full disk they would take the room that the rest needs
                shutil.rmtree(left, ignore_errors=True)


def write_file(path: Path, content: str) -> None:
    """Write a text file atomically.

    Raises: OutputError: the disk is full, or the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            _write_synced(temporary, content.encode())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError while `path` is written into an OutputError that says what to do."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or type(error).__name__}; make room or get the right to "
            "write there, then continue with --resume."
        ) from error


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
