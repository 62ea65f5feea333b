"""Where the claim counts on it that nobody knows who was drawn, nothing that others may read tells it."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from tampered import SIZES, Tampered, only, spoiled, untouched

from quorate.client.site.site import Site
from quorate.server.results.complete import complete_run
from quorate.server.rounds import loop
from quorate.server.rounds.loop import run_rounds
from quorate.server.rounds.run import Run
from quorate.server.tracking.run_status import STATUS_FILE, RunStatus
from quorate.server.tracking.trackers import TensorboardTracker
from quorate.shared.errors import QuorumNotMet
from quorate.shared.process.files import write_folder

PRIVACY = {"unit": "client", "delta": 0.01, "noise_multiplier": 0.3}
UNIFORM = {"name": "fedavg", "weighting": "uniform"}
SECRET = {"record.jsonl", "metrics.jsonl", "events.jsonl", "progress.json", "round.json", "privacy.json"}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def open_umask() -> Any:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
def test_what_others_may_read_does_not_say_who_was_drawn(
    make_run: Any, make_sites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra `tensorboard`")
    out, kept = tmp_path / "out", []
    real = loop.save_checkpoint

    def look(output_dir: Path, *arguments: Any, **options: Any) -> Path:
        kept.extend(mode(path) for path in output_dir.glob("released-*/*"))  # gone after the round
        return real(output_dir, *arguments, **options)

    monkeypatch.setattr(loop, "save_checkpoint", look)
    config = make_run(
        privacy={**PRIVACY, "participation_hidden": True},
        aggregation=UNIFORM,
        federation={"rounds": 4, "sites_per_round": 2, "quorum": 1},
    )
    site = Site(make_sites(**SIZES))
    run = Run.open(site.prepare(config), out, trackers=[TensorboardTracker()])
    grid = Tampered(site, untouched)
    complete_run(grid, run, run_rounds(grid, run))
    assert kept and set(kept) == {0o600}
    found = {path.name: path for path in out.rglob("*") if path.is_file()}
    assert (found.keys() & SECRET) == SECRET - {"round.json"}
    for path in out.rglob("*"):
        if path.name in SECRET or path.parent.name.startswith("checkpoint-"):
            assert mode(path) == 0o600, path
        if path.is_dir() and path.name.startswith("checkpoint-"):
            assert mode(path) == 0o700
    assert mode(out / "report.html") & 0o044, "the report is for others"
    page = (out / "report.html").read_text()
    assert "Who took part in which round is hidden" in page
    for telling in (
        "Which site counted",
        "How often each site",
        "Weight of each site",
        "train_loss",
    ):
        assert telling not in page, telling
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags and all(re.match("validation/|test/", tag) for tag in tags), tags


def test_a_summary_names_nobody_who_was_drawn(make_run: Any, make_sites: Any, tmp_path: Path) -> None:
    config = make_run(
        privacy={**PRIVACY, "participation_hidden": True},
        aggregation=UNIFORM,
        federation={"rounds": 4, "sites_per_round": 3, "quorum": 3},
    )
    site = Site(make_sites(**SIZES))
    run = Run.open(site.prepare(config), tmp_path / "out")
    grid = Tampered(site, only("south", spoiled, round=3))
    result = run_rounds(grid, run)
    assert result.status == "quorum-not-met" and "south" in str(result.stopped)
    with pytest.raises(QuorumNotMet):
        complete_run(grid, run, result)
    summary = (tmp_path / "out" / "summary.json").read_text()
    assert '"excluded": {}' in summary and "gave a good update" not in summary
    assert "gave a good update" not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.usefixtures("open_umask")
def test_without_that_claim_files_are_as_the_umask_says(
    make_run: Any, make_sites: Any, tmp_path: Path
) -> None:
    config = make_run(federation={"rounds": 1})
    site = Site(make_sites(**SIZES))
    run = Run.open(site.prepare(config), tmp_path / "out")
    grid = Tampered(site, untouched)
    complete_run(grid, run, run_rounds(grid, run))
    assert mode(tmp_path / "out" / "record.jsonl") == 0o644


@pytest.mark.usefixtures("open_umask")
def test_private_files_are_private_from_their_first_byte(tmp_path: Path) -> None:
    RunStatus(state="running", flower_run_id=1).write(tmp_path)
    assert mode(tmp_path / STATUS_FILE) == 0o600
    write_folder(tmp_path / "folder", {"a": b"x"}, private=True)
    assert (mode(tmp_path / "folder"), mode(tmp_path / "folder" / "a")) == (0o700, 0o600)
