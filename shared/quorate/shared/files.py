"""Files that must never be half there or readable by others: keys, certificates, secrets, indexes."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quorate.shared.errors import OutputError

PRIVATE, PUBLIC, PRIVATE_FOLDER = 0o600, 0o644, 0o700
"""Modes, whatever the umask: what only its owner may read, what anyone may, and a folder of the former."""

log = logging.getLogger(__name__)


def write_atomically(path: Path, content: bytes, mode: int = PRIVATE) -> None:
    """Write a file so that a reader, and a kill at any moment, sees all of it or none of it.

    It is on disk (fsync) before its name appears, and never readable by more than `mode` says. What a kill
    leaves behind is `.NAME.tmp`, which the next call replaces.

    Raises: OutputError: the disk is full, or the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE)
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_folder(path.parent)


def make_folder(path: Path, mode: int = PRIVATE_FOLDER) -> None:
    """Make a folder (and those above it) if it is not there, with this mode whatever the umask.

    Raises: OutputError.
    """
    with writing(path):
        if not path.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=PRIVATE_FOLDER)
            path.chmod(mode)
            sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put names that appeared or went in `folder` on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process, so that two commands do not write into it at once.

    The lock is the system's and leaves no file: it is gone with the process, however that ends.

    Raises: OutputError: another process holds it.
    """
    with writing(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{folder}: another command works in this folder; wait for its end.") from None
        except OSError as error:  # some network file systems lock no folders
            log.debug("%s: no lock (%s)", folder, error.strerror)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError while `path` is written into an OutputError that says what to do."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or type(error).__name__}; make room or get the right to "
            "write there, then give the command again."
        ) from error
