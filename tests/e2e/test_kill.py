"""Killed at any moment, a run goes on with `--resume` and ends bit for bit where the run left alone ends.

What is killed is the real command in a process of its own: a fork that sends itself SIGKILL at a named moment
(tests/helpers/cli_forks.py), and, unpatched, at random times.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_forks import Ended, Point
from moments import APPEND, MEASURE, PHASES, REPLACE, RULE, SHOW, STEP, WRITES
from tiny_runs import CASES, ROUNDS, TinyRuns

from quorate.server.rounds.checkpoint import list_checkpoints

pytestmark = pytest.mark.slow


def last_checkpoint(out: Path) -> int:
    return (list_checkpoints(out) or [0])[-1]


def check_killed(out: Path, killed: Ended, finished: int) -> None:
    """Only the round in flight is lost: whoever was told that a round is finished finds it again."""
    assert killed.code == -signal.SIGKILL, killed.err
    assert last_checkpoint(out) == finished
    told = [line for line in killed.err.splitlines() if line.startswith("round ") and line.endswith(" s")]
    assert len(told) <= finished


def resume(runs: TinyRuns, case: str, out: str, finished: int) -> None:
    resumed = runs.simulate(case, out, "--resume")
    assert resumed.code == 0, resumed.err
    assert (f"going on after round {finished}," in resumed.err) == (finished > 0)
    assert f"round {finished}/{ROUNDS} · train" not in resumed.err, "a finished round is not run again"
    runs.check_end(case, out)


@pytest.mark.parametrize(
    ("case", "moment"),
    [*(("fedavg", name) for name in (PHASES | WRITES)), *(("fedex", name) for name in RULE)],
)
def test_killed_and_resumed(runs: TinyRuns, case: str, moment: str) -> None:
    point, finished = (PHASES | WRITES)[moment]
    out = f"{case}-{moment}"
    check_killed(runs.folder / out, runs.simulate(case, out, at=point), finished)
    resume(runs, case, out, finished)


@pytest.mark.parametrize("phase", ["local only", "centralised"])
def test_killed_in_a_reference_run(runs: TinyRuns, phase: str) -> None:
    out = f"killed in {phase}"
    killed = runs.simulate("references", out, at=Point(STEP, 2, phase, nth=2))
    check_killed(runs.folder / out, killed, ROUNDS)
    resume(runs, "references", out, ROUNDS)


def test_a_resumed_run_that_is_killed_again(runs: TinyRuns) -> None:
    stops = [
        (Point(APPEND, 1, "checkpoint", file="record.jsonl", when="torn"), 1),
        (Point(REPLACE, file=".record.jsonl.tmp"), 1),  # while the files are brought to the checkpoint
        (Point(REPLACE, file=".record.jsonl.tmp", when="after"), 1),
        (Point(STEP, 2, "train", nth=3), 1),
        (Point(APPEND, 2, "checkpoint", file="metrics.jsonl", when="torn"), 2),
        (Point(MEASURE, 3, "evaluate", nth=3), 2),
        (Point(SHOW, 3, "outputs", nth=2), 3),
    ]
    for point, finished in stops:
        killed = runs.simulate("fedavg", "again", "--resume", at=point)
        check_killed(runs.folder / "again", killed, finished)
    resume(runs, "fedavg", "again", ROUNDS)


def test_an_adapter_that_is_replaced_is_never_half_there(runs: TinyRuns) -> None:
    """Writing the outputs again, as a resume does, must not take the adapter apart first."""
    out = runs.folder / "replaced"
    assert runs.simulate("fedavg", out.name).code == 0
    removal = Point("os:unlink", ROUNDS, "outputs", file="adapter_model.safetensors", when="after")
    check_killed(out, runs.simulate("fedavg", out.name, "--resume", at=removal), ROUNDS)
    found = {str(path.relative_to(out)): path.read_bytes() for path in (out / "adapter").iterdir()}
    whole = runs.whole("fedavg")
    assert found == {name: content for name, content in whole.items() if name.startswith("adapter/")}
    resume(runs, "fedavg", out.name, ROUNDS)


# --- Unpatched, at random times


def test_killed_at_random_times(runs: TinyRuns) -> None:
    seconds = runs.simulate("fedex", "timed").seconds
    times, finished, out = [], 0, runs.folder / "random"
    for _ in range(4):
        times.append(random.uniform(0, seconds))
        killed = runs.simulate("fedex", out.name, "--resume", kill_after=times[-1])
        now = last_checkpoint(out)
        assert killed.code in (-signal.SIGKILL, 0) and now >= finished, times
        finished = now
    print("killed after", times)  # shown if the rest fails
    resume(runs, "fedex", out.name, finished)


def test_the_command_itself_killed_and_resumed(runs: TinyRuns) -> None:
    """No fork: two processes as a person starts them, and the same end as in the forks."""
    command = [sys.executable, "-c", "from quorate.deploy.cli import main; main()"]
    command += ["simulate", "tiny.yaml", *CASES["fedavg"], "-o", "plain"]
    later = random.uniform(0, 0.8)
    print("killed", later, "s after joining")
    with subprocess.Popen(
        command, cwd=runs.folder, env=runs.env, text=True, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        assert any(line == "join\n" for line in process.stderr)
        time.sleep(later)
        process.kill()
    resumed = subprocess.run(
        [*command, "--resume"], cwd=runs.folder, env=runs.env, text=True, capture_output=True, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    runs.check_end("fedavg", "plain")


# --- Damaged


def edit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("name", ["state.safetensors", "progress.json"])
@pytest.mark.parametrize("damage", [edit, truncate])
def test_a_damaged_checkpoint_is_refused(runs: TinyRuns, damage: Callable[[Path], None], name: str) -> None:
    out = runs.folder / f"{damage.__name__}-{name}"
    check_killed(out, runs.simulate("two checkpoints", out.name, at=Point(STEP, 3, "train")), 2)
    damage(out / "checkpoint-2" / name)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    refused = runs.simulate("two checkpoints", out.name, "--resume")
    assert refused.code == 2 and "Traceback" not in refused.err
    assert refused.err.splitlines()[-1] == (
        f"CheckpointError: {out.name}/checkpoint-2/{name} is not what was written (truncated or edited); "
        "delete checkpoint-2 to resume from checkpoint-1."
    )
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    shutil.rmtree(out / "checkpoint-2")
    resume(runs, "two checkpoints", out.name, 1)
