"""The one way in which files and folders are written: whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from quorate.shared.errors import OutputError
from quorate.shared.process.files import (
    BY_UMASK,
    PRIVATE,
    PUBLIC,
    put_folder,
    unfinished,
    write_atomically,
    write_folder,
)


def disk_full(_descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def put_one(folder: Path) -> None:
    with unfinished(folder) as temporary:
        (temporary / "a").write_text("new")
        put_folder(temporary, folder)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_atomically(path / "a", "new"),
        lambda path: write_folder(path, {"a": b"new"}),
        put_one,
    ],
)
def test_a_full_disk_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    folder = tmp_path / "folder"
    write_folder(folder, {"a": b"old"})
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", disk_full)
        with pytest.raises(OutputError):
            write(folder)
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path("folder"), Path("folder/a")]
    assert (folder / "a").read_text() == "old"
    write(folder)
    assert (folder / "a").read_text() == "new" and list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(("mode", "found"), [(PRIVATE, 0o600), (PUBLIC, 0o644), (BY_UMASK, 0o640)])
def test_a_mode_holds_whatever_the_umask_and_whatever_a_kill_has_left(
    tmp_path: Path, mode: int | None, found: int
) -> None:
    path, left = tmp_path / "a", tmp_path / ".a.tmp"
    before = os.umask(0o027)
    try:
        if mode is not BY_UMASK:
            left.write_text("half")
            left.chmod(0o666)
        write_atomically(path, "ü", mode)
    finally:
        os.umask(before)
    assert (path.stat().st_mode & 0o777, path.read_bytes()) == (found, "ü".encode())
    assert not left.exists()


def test_a_folder_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, synced = tmp_path / "folder", []

    def fsync(descriptor: int) -> None:
        assert folder.exists() == (tmp_path.stat().st_ino == os.fstat(descriptor).st_ino)
        synced.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    with unfinished(folder) as temporary:
        (temporary / "in").mkdir()
        for name in ("a", "in/b"):
            (temporary / name).write_text("new")
        put_folder(temporary, folder)
    assert {path.stat().st_ino for path in (tmp_path, folder, *folder.rglob("*"))} == set(synced)


def test_a_filled_folder_that_is_not_put_is_gone(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), unfinished(tmp_path / "folder") as temporary:
        (temporary / "a").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_place_of_a_file_is_not_written_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder of somebody else, who plants it between two steps of ours."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    real = Path.unlink

    def planted(self: Path, missing_ok: bool = False) -> None:
        real(self, missing_ok=missing_ok)
        if self.name == ".secret.tmp" and not self.is_symlink():
            self.symlink_to(victim)

    monkeypatch.setattr(Path, "unlink", planted)
    for mode in (PRIVATE, BY_UMASK):
        with pytest.raises(OutputError):
            write_atomically(tmp_path / "secret", b"x", mode)
    assert victim.read_text() == "precious"
