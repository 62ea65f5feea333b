# ruff: noqa: E501 - tables of messages, one a line
"""What goes wrong during a run: a named exclusion or one clear error, and nothing is lost."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bad_input
import numpy as np
import pytest
from bad_input import (
    LISTED,
    ROWS,
    assert_one_error,
    command,
    csv,
    put,
)

from quorate.client.site.request import Request
from quorate.client.site.site import Site
from quorate.server.rounds import loop
from quorate.server.rounds.run import locked_output
from quorate.server.tracking.events import EVENTS_FILE
from quorate.server.tracking.records import Summary
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.protocol.messages import Update

ADAPTER = "adapter/adapter_model.safetensors"


def summary_of(folder: Path) -> Summary:
    return Summary.model_validate_json((folder / "summary.json").read_text())


def assert_finite(folder: Path) -> None:
    Adapter.from_bytes((folder / ADAPTER).read_bytes()).check_finite()


# --- A site whose update is no good


def spoil_updates(monkeypatch: pytest.MonkeyPatch, site: str, *bad_rounds: int) -> None:
    """Let one site answer with NaN in these rounds."""
    real = Site.handle_many

    def handle_many(self: Site, requests: Sequence[Request]) -> list[Update]:
        updates = real(self, requests)
        for index, update in enumerate(updates):
            header = update.header
            if header.phase == "fit" and header.site == site and header.round in bad_rounds:
                updates[index] = Update(header, update.arrays.map(lambda _, array: array * np.float32("nan")))
        return updates

    monkeypatch.setattr(Site, "handle_many", handle_many)


def test_nan_in_an_update_is_a_named_exclusion_and_the_others_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_updates(monkeypatch, "south", 2)
    said = command("simulate", "tiny.yaml", "federation.quorum=1", "-o", "out")
    assert said.code == 0 and not said.err
    assert "set aside: south in round 2 (non-finite)" in said.out.splitlines()
    why = summary_of(folder / "out").excluded["south"][2].reason
    assert "holds NaN or infinity" in why and "south" in (folder / "out/report.html").read_text()
    assert_finite(folder / "out")


def test_nan_below_the_quorum_stops_the_run_and_costs_no_finished_round(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        spoil_updates(patched, "south", 2)
        said = command("simulate", "tiny.yaml", "-o", "out", "--json")
    assert said.code == 3 and json.loads(said.out)["status"] == "quorum-not-met"
    last = said.err.splitlines()[-1]
    assert_one_error(
        last, "QuorumNotMet: round 2 needs 2 of 2 sites, 1 gave a good update | south: | NaN | --resume"
    )
    assert summary_of(folder / "out").rounds == 1 and (folder / "out" / ADAPTER).is_file()
    assert command("simulate", "tiny.yaml", "-o", "out", "--resume").code == 0
    assert (folder / "out" / ADAPTER).read_bytes() == (folder / "runs/tiny" / ADAPTER).read_bytes()


def test_training_that_diverges_everywhere_is_no_quorum(folder: Path) -> None:
    sgd = (
        "training.optim=sgd",
        "training.max_grad_norm=0",
        "training.learning_rate=1e6",
        "adapter.lora_alpha=1e9",
    )
    said = command("simulate", "tiny.yaml", *sgd, "-o", "out")
    assert said.code == 3 and "Traceback" not in said.err
    *before, last = said.err.splitlines()
    assert all(line.endswith("lower training.learning_rate.") for line in before)
    assert_one_error(
        last,
        "QuorumNotMet: round 1 needs 2 of 2 sites, 0 gave a good update | north: | lower the learning rate | south: | --resume",
    )
    assert summary_of(folder / "out").status == "quorum-not-met" and (folder / "out/report.html").is_file()


def test_a_site_that_diverges_alone_costs_neither_the_others_nor_their_references(folder: Path) -> None:
    """A weight that float32 cannot hold, on a label that one site alone has."""
    put("tiny.sites.yaml", LISTED)(folder)
    put("north.csv", csv([row for row in ROWS if row[1] != "pulmonary"]))(folder)
    put("south.csv", csv(ROWS))(folder)
    settings = ("task.class_weights=[1,1,1e39]", "evaluation.references=[local_only,centralised]")
    all_rows = "training.per_device_train_batch_size=40"  # so that every step meets the label
    said = command("simulate", "tiny.yaml", *settings, all_rows, "federation.quorum=1", "-o", "out")
    assert said.code == 0 and "Traceback" not in said.err
    assert all("training diverged; lower training.learning_rate" in line for line in said.err.splitlines())
    lines = said.out.splitlines()
    assert "set aside: south in round 1, 2 (non-finite)" in lines
    for name in ("south", "(all sites)"):
        assert any(line.startswith(f"no reference: {name}: ") for line in lines)
    summary = summary_of(folder / "out")
    assert summary.references is not None and set(summary.references.local_only) == {"north"}
    assert set(summary.worth) == {"north"}
    assert "Left out, as its reference run failed: south" in (folder / "out/report.html").read_text()
    assert_finite(folder / "out")


# --- What is normal


def test_sites_that_lack_classes_or_have_one_alone_are_a_note(folder: Path) -> None:
    put("tiny.sites.yaml", LISTED)(folder)
    put("north.csv", csv([row for row in ROWS if row[1] != "pulmonary"]))(folder)
    put("south.csv", csv([row for row in ROWS if row[1] == "hepatic"]))(folder)
    settings = ("task.class_weights=balanced", "evaluation.references=[local_only,centralised]")
    said = command("simulate", "tiny.yaml", *settings, "-o", "out")
    assert said.code == 0 and not said.err and "set aside" not in said.out
    notes = {site: each.notes for site, each in summary_of(folder / "out").sites.items()}
    assert notes == {
        "north": ("has no training row of: pulmonary",),
        "south": ("has no training row of: cardiac, pulmonary",),
    }
    page = (folder / "out/report.html").read_text()
    assert all(note in page for (note,) in notes.values())


def test_a_site_of_one_row_takes_part(folder: Path) -> None:
    put("tiny.sites.yaml", LISTED)(folder)
    put("north.csv", csv(ROWS))(folder)
    put("south.csv", csv(ROWS[:1]))(folder)
    said = command("simulate", "tiny.yaml", "evaluation.references=[local_only,centralised]", "-o", "out")
    assert said.code == 0 and not said.err and "set aside" not in said.out
    assert summary_of(folder / "out").sites["south"].rows == {"train": 1, "validation": 0, "test": 0}


# --- Writing


def test_two_processes_do_not_run_into_one_folder(folder: Path) -> None:
    with locked_output(folder / "out"):
        said = command("simulate", "tiny.yaml", "-o", "out")
    assert said.code == 2 and not list((folder / "out").iterdir())
    assert_one_error(said.err, "OutputError: another process is running into out; | (-o)")
    assert command("simulate", "tiny.yaml", "-o", "out").code == 0


def test_a_tracker_that_cannot_write_is_named_and_the_run_goes_on(folder: Path) -> None:
    put("out/tensorboard", "in the way")(folder)
    said = command("simulate", "tiny.yaml", "report_to=[tensorboard]", "-o", "out")
    assert said.code == 0 and (folder / "out/report.html").is_file()
    (line,) = said.err.splitlines()
    assert "TensorboardTracker failed in start" in line and "the run goes on without it" in line


def test_a_run_that_cannot_write_its_events_ends_and_goes_on_where_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.save_checkpoint

    def in_the_way(output_dir: Path, state: Any, progress: Any, keep: int, **options: Any) -> Path:
        if progress.round == 2:
            (output_dir / EVENTS_FILE).rename(output_dir / "aside")
            (output_dir / EVENTS_FILE).mkdir()
        return real(output_dir, state, progress, keep, **options)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "save_checkpoint", in_the_way)
        said = command("simulate", "tiny.yaml", "-o", "out")
    assert said.code == 2
    assert_one_error(said.err, "OutputError: cannot write out/events.jsonl: | --resume")
    (folder / "out" / EVENTS_FILE).rmdir()
    (folder / "out" / "aside").rename(folder / "out" / EVENTS_FILE)
    assert_goes_on(folder)


def test_a_full_disk_is_one_error_and_the_run_goes_on_where_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system lets no file grow, as a full disk does, from the second checkpoint on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = loop.save_checkpoint

    def full(output_dir: Path, state: Any, progress: Any, keep: int, **options: Any) -> Path:
        if progress.round == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (900, hard))
        return real(output_dir, state, progress, keep, **options)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "save_checkpoint", full)
        try:
            said = command("simulate", "tiny.yaml", "-o", "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert said.code == 2
    assert_one_error(said.err, "OutputError: cannot write out/checkpoint-2: | make room | --resume")
    assert_goes_on(folder)


SPACE = {36: "record.jsonl", 56: "checkpoint-2", 80: "adapter", 100: "summary.json", 128: "report.html"}
"""Size of the disk [KiB] -> what no longer fits on it; a few KiB more or less make it a neighbour of it."""
ON_SMALL_DISKS = """
import json, shutil, subprocess, sys
sys.path.append(sys.argv[1])
from bad_input import command
said = {}
for size in sys.argv[2:]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", "small"], check=True)
    said[size] = command("simulate", "tiny.yaml", "-o", "small/out")
    shutil.copytree("small/out", f"out-{size}")
    subprocess.run(["umount", "small"], check=True)
print(json.dumps(said))
"""


@pytest.mark.slow
def test_a_really_full_disk_loses_nothing(folder: Path) -> None:
    """On disks in memory that are too small; what is there goes on once it is copied to a larger one."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    probe = subprocess.run(
        [*namespace, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
    )
    if probe.returncode:
        pytest.skip("this system lets nobody mount a disk in memory")
    (folder / "small").mkdir()
    arguments = [str(Path(bad_input.__file__).parent), *map(str, SPACE)]
    done = subprocess.run(
        [*namespace, sys.executable, "-c", ON_SMALL_DISKS, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for size, (code, _, err) in json.loads(done.stdout).items():
        assert code == 2
        assert_one_error(err, f"OutputError: | {SPACE[int(size)]} | No space left on device")
        assert not list((folder / f"out-{size}").glob(".*")), "half a file takes the room that others need"
        assert_goes_on(folder, f"out-{size}")


def assert_goes_on(folder: Path, out: str = "out") -> None:
    """Assert that a run ends, once there is room, as the one that always had it."""
    assert command("simulate", "tiny.yaml", "-o", out, "--resume").code == 0
    for name in (ADAPTER, "metrics.jsonl"):
        assert (folder / out / name).read_bytes() == (folder / "runs/tiny" / name).read_bytes()
    assert summary_of(folder / out).status == "done" and (folder / out / "report.html").is_file()
