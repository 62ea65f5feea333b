"""Ctrl-C at an awkward moment."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quorate.client.site.site import Site
from quorate.deploy.commands.both.options import adapter_folder
from quorate.server.rounds.loop import run_rounds
from quorate.server.rounds.run import RECORD_FILE, Run, read_jsonl
from quorate.server.tracking.records import RoundMetrics, RoundRecord
from quorate.shared.process import files
from quorate.shared.process.files import _exchange, restore_folder, write_folder
from quorate.simulations.in_process_grid import InProcessGrid


def test_an_interrupt_between_checkpoint_and_record_counts_the_round(
    make_run: Any, make_sites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C can come anywhere: what is on disk is what the outputs must be made from."""
    site = Site(make_sites(north=9, south=7))
    run = Run.open(site.prepare(make_run()), tmp_path / "out")
    append = Run.append

    def interrupted(self: Run, record: RoundRecord, metrics: RoundMetrics) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "append", interrupted)
    result = run_rounds(InProcessGrid(site, site.names), run)
    monkeypatch.setattr(Run, "append", append)
    assert result.status == "interrupted"
    assert result.progress is not None and result.progress.round == 1
    assert result.progress.record.state_hash == result.state.stored().content_hash
    records = read_jsonl(run.output_dir / RECORD_FILE, RoundRecord)
    assert [each.round for each in records] == [1]


REPLACES = """
import os, signal, sys
from pathlib import Path
from quorate.shared.process import files

folder, nth, exchanges = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "exchange"
rename, calls = Path.rename, iter(range(1, 99))

def killed(self, target):
    if next(calls) == nth:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)

Path.rename = killed
if not exchanges:  # as on NFS
    files._exchange = lambda one, other: False
for number in range(10**6):
    files.write_folder(folder, {"a": b"%d" % number, "b": b"%d" % number})
"""


def replaces(folder: Path, nth: int, how: str) -> subprocess.Popen[bytes]:
    """Replace a folder again and again, in a process that kills itself before its nth rename."""
    return subprocess.Popen([sys.executable, "-c", REPLACES, str(folder), str(nth), how])


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    for use in (restore_folder, lambda folder: adapter_folder(folder.parent)):
        write_folder(folder, {"adapter_config.json": b"{}", "b": b"old"})
        assert replaces(folder, 2, "renames").wait(60) == -signal.SIGKILL
        assert not folder.exists()
        use(folder)
        assert (folder / "b").read_bytes() == b"old"
    restore_folder(Path())  # a name that has no other beside it
    assert replaces(folder, 2, "renames").wait(60) == -signal.SIGKILL
    write_folder(folder, {"c": b"new"})
    assert [each.name for each in folder.iterdir()] == ["c"]
    assert list(tmp_path.iterdir()) == [folder]


def test_readers_always_find_a_folder_that_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    write_folder(folder, {"a": b"first"})
    if not _exchange(folder, folder):
        pytest.skip("this file system cannot exchange two names")
    process = replaces(folder, 1, "exchange")  # which renames nothing
    try:
        while not (folder / "b").exists():
            assert process.poll() is None
        assert all(folder.is_dir() for _ in range(100_000))
    finally:
        process.kill()
        process.wait()
    assert {path.name for path in folder.iterdir()} == {"a", "b"}
    assert len({path.read_bytes() for path in folder.iterdir()}) == 1
    write_folder(folder, {"c": b"new"})
    assert list(tmp_path.iterdir()) == [folder] and (folder / "c").exists()


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_while_a_folder_is_replaced_leaves_one_of_the_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int, when: str
) -> None:
    """The old one steps aside (first rename) before the new one takes its name (second)."""
    folder, rename, calls = tmp_path / "adapter", Path.rename, iter(range(1, 9))
    write_folder(folder, {"a": b"old", "b": b"old"})

    def interrupted(self: Path, target: Path) -> None:
        now = next(calls) == nth
        if now and when == "before":
            raise KeyboardInterrupt
        rename(self, target)
        if now:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", interrupted)
        patched.setattr(files, "_exchange", lambda one, other: False)  # as on NFS
        with pytest.raises(KeyboardInterrupt):
            write_folder(folder, {"a": b"new", "c": b"new"})
    assert list(tmp_path.iterdir()) == [folder]
    left = {path.name: path.read_bytes() for path in folder.iterdir()}
    new = (nth, when) == (2, "after")
    assert left == ({"a": b"new", "c": b"new"} if new else {"a": b"old", "b": b"old"})
    write_folder(folder, {"d": b"next"})
    assert [path.name for path in folder.iterdir()] == ["d"]
