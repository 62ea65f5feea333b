"""Ctrl-C at an awkward moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quorate.client.site import Site
from quorate.server.records import RoundMetrics, RoundRecord
from quorate.server.rounds import run_rounds
from quorate.server.run import RECORD_FILE, Run, read_jsonl
from quorate.shared.files import write_folder
from quorate.simulations.grid import InProcessGrid


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
    assert result.progress.record.state_hash == result.state.pack().content_hash
    records = read_jsonl(run.output_dir / RECORD_FILE, RoundRecord)
    assert [each.round for each in records] == [1]


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
        with pytest.raises(KeyboardInterrupt):
            write_folder(folder, {"a": b"new", "c": b"new"})
    assert list(tmp_path.iterdir()) == [folder]
    left = {path.name: path.read_bytes() for path in folder.iterdir()}
    new = (nth, when) == (2, "after")
    assert left == ({"a": b"new", "c": b"new"} if new else {"a": b"old", "b": b"old"})
    write_folder(folder, {"d": b"next"})
    assert [path.name for path in folder.iterdir()] == ["d"]
