"""Files and folders that are never half there, and private ones that nobody else may read."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from quorate.shared.errors import OutputError

PRIVATE, PUBLIC, PRIVATE_FOLDER = 0o600, 0o644, 0o700
"""Modes, whatever the umask: what only its owner may read, what anyone may, and a folder of the former."""
BY_UMASK = None
"""In place of a mode: what people made with their umask in mind, such as the results of a run."""

log = logging.getLogger(__name__)

# Linux's renameat2, which Python does not have.
_RENAME = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def write_atomically(
    path: Path, content: bytes | str, mode: int | None = PRIVATE, owner: tuple[int, int] | None = None
) -> None:
    """Write a file so that a reader, and a kill at any moment, sees all of it or none of it.

    It is on disk (fsync) before its name appears, and never readable by more than `mode` says. What a kill
    leaves behind is `.NAME.tmp`, which the next call replaces. Two processes must not write one file at once.

    Args:
        path: an existing file is replaced.
        content: a text is written as UTF-8.
        mode: whatever the umask; `BY_UMASK`: as the umask says.
        owner: user and group that it shall belong to, which only root can say.
    Raises: OutputError: the disk is full, or the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            with opened(temporary, "wb", private=mode is not None) as stream:
                if mode is not None:
                    os.fchmod(stream.fileno(), mode)
                if owner is not None:
                    os.fchown(stream.fileno(), *owner)
                stream.write(content.encode() if isinstance(content, str) else content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except BaseException:  # on a full disk it would take the room that the rest needs
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_folder(folder: Path, files: Mapping[str, bytes], *, private: bool = False) -> None:
    """Write `files` (relative name -> content) as `folder`, as `put_folder` does.

    Args:
        private: for its owner alone, whatever the umask.
    Raises: OutputError: the disk is full, or the place cannot be written.
    """
    restore_folder(folder)
    with unfinished(folder, PRIVATE_FOLDER if private else BY_UMASK) as temporary:
        for name, content in files.items():
            with opened(temporary / name, "wb", private=private) as stream:
                stream.write(content)
        put_folder(temporary, folder)


@contextmanager
def unfinished(folder: Path, mode: int | None = BY_UMASK) -> Iterator[Path]:
    """Yield a new folder beside `folder`, to be filled and `put_folder` there; it is gone afterwards.

    Raises: OutputError: the disk is full, or the place cannot be written.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    with writing(folder):
        try:
            if temporary.exists():
                shutil.rmtree(temporary)
            temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir(0o777 if mode is None else mode)
            yield temporary
        finally:  # on a full disk it would take the room that the rest needs
            shutil.rmtree(temporary, ignore_errors=True)


def put_folder(temporary: Path, folder: Path) -> None:
    """Give a complete folder its name: readers see all of it or what was there before.

    An existing folder is replaced. Everything is on disk (fsync) before the name appears. On a file system
    that cannot exchange two names in one step (NFS), a kill in between leaves the earlier folder as
    `.NAME.old`; `restore_folder` gives it its name back.

    Args:
        temporary: on the same file system; afterwards it is gone, or holds what was there before.
        folder: its name from now on.
    Raises: OutputError: the disk is full, or the place cannot be written.
    """
    old = folder.with_name(f".{folder.name}.old")
    with writing(folder):
        for each in (*temporary.rglob("*"), temporary):
            sync(each)
        try:
            if not folder.exists():
                temporary.rename(folder)
            elif not _exchange(temporary, folder):
                # Aside in one step: a kill while it is deleted would leave half of it.
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
                temporary.rename(folder)
            sync(folder.parent)
        finally:
            if old.exists() and not folder.exists():
                old.rename(folder)
            shutil.rmtree(old, ignore_errors=True)


def restore_folder(folder: Path) -> None:
    """Give a folder its name back, where `write_folder` was killed before the next one had it.

    Raises: OutputError: the place cannot be written.
    """
    old = folder.parent / f".{folder.name}.old"  # with_name has no answer to Path(".")
    if old.is_dir() and not folder.exists():
        with writing(folder):
            old.rename(folder)
            sync(folder.parent)


def make_folder(path: Path, mode: int = PRIVATE_FOLDER) -> None:
    """Make a folder (and those above it) if it is not there, with this mode whatever the umask.

    Raises: OutputError.
    """
    with writing(path):
        if not path.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=PRIVATE_FOLDER)
            path.chmod(mode)
            sync(path.parent)


def put_aside(path: Path, name: str) -> Path:
    """Give a file another name in its folder; returns its path. Raises: OutputError."""
    with writing(path):
        aside = path.rename(path.with_name(name))
        sync(path.parent)
    return aside


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path, busy: str | None = None) -> Iterator[None]:
    """Hold `folder` for this process, so that two commands do not write into it at once.

    The lock is the system's and leaves no file: it is gone with the process, however that ends.

    Args:
        folder: must be there.
        busy: what to say when another process holds it.

    Raises: OutputError: another process holds it.
    """
    with writing(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy = busy or f"{folder}: another command works in this folder; wait for its end."
            raise OutputError(busy, kind="folder-busy") from None
        except OSError as error:  # some network file systems lock no folders
            log.debug("%s: no lock (%s)", folder, error.strerror)
        yield
    finally:
        os.close(descriptor)


def held(path: Path) -> bool | None:
    """Whether a process holds this file or folder as `locked` does; None where the file system has no locks.

    Raises: OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Shared, so that two who look do not see each other, and let go of at once.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def take_lock(descriptor: int) -> None:
    """Take the lock of an open file for as long as the file stays open, and write this process's id into it.

    Raises: BlockingIOError: another process has it; `holder` tells which.
    """
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)


def holder(path: Path) -> int | None:
    """Return the id of the process that holds the lock file `path`; 0 where it is not known, None: nobody."""
    if not path.exists() or held(path) is not True:
        return None
    content = path.read_bytes()
    return int(content) if content.isdigit() else 0


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError while `path` is written into an OutputError that says what to do."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or type(error).__name__}; make room or get the right to "
            "write there, then give the command again (a run continues with --resume).",
            kind="not-written",
        ) from error


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; returns whether this system and file system can."""
    if _RENAME is None:
        return False
    if _RENAME(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def open_to_append(path: Path, *, private: bool) -> int:
    """Return the descriptor of a file to append to, made where it is not there; see `opened`."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, PRIVATE if private else 0o666)
    if private:
        os.fchmod(descriptor, PRIVATE)
    return descriptor


def opened(path: Path, mode: Literal["ab", "wb"], *, private: bool) -> BinaryIO:
    """Open a file to write it anew or to append to it, made where it is not there.

    Args:
        private: for its owner alone, from its first byte on, whatever the umask and whatever was there.
    """
    if mode == "ab":
        return os.fdopen(open_to_append(path, private=private), mode)
    # What a kill left may be anybody's to read. A link that somebody else puts there, in a folder of theirs
    # in which root writes, is no place to write to.
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    return os.fdopen(os.open(path, flags, PRIVATE if private else 0o666), mode)
