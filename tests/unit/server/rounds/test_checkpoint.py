"""Checkpoints: written whole or not at all, refused when changed, and a run goes on from them."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import refuses
from tampered import described, edited

from quorate.client.site.site import Site
from quorate.server.results.outputs import best_state
from quorate.server.rounds.checkpoint import Progress, list_checkpoints, load_checkpoint, save_checkpoint
from quorate.server.rounds.loop import Result, run_rounds
from quorate.server.rounds.run import METRICS_FILE, RECORD_FILE, RUN_FILE, Run, read_jsonl
from quorate.server.tracking.events import Event, PhaseBegan, RoundDone
from quorate.server.tracking.records import RoundMetrics, RoundRecord
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.adapters.peft_export import as_lora
from quorate.shared.aggregation import GlobalState
from quorate.shared.errors import CheckpointError, OutputError
from quorate.shared.model.lora_model import load_model
from quorate.shared.process import files
from quorate.shared.process.files import write_folder
from quorate.shared.protocol.messages import Update
from quorate.simulations.in_process_grid import InProcessGrid

ROUNDS = 3


# --- Folders alone


def state_of(round: int) -> GlobalState:
    draw = np.random.default_rng(round)
    arrays = {
        f"layer.{name}": draw.standard_normal((2, 2)).astype(np.float32)
        for name in ("lora_A.weight", "lora_B.weight", "residual_A", "residual_B")
    }
    return GlobalState.from_stored(Adapter(arrays))


def progress_of(round: int, best: int | None = None) -> Progress:
    record = RoundRecord(
        round=round, cohort=("a",), weights={"a": 1.0}, num_examples={"a": 3}, num_steps={"a": 1},
        update_norms={"a": 0.5}, excluded={}, bytes_down={}, bytes_up={}, seconds={}, state_hash="",
    )  # fmt: skip
    metrics = RoundMetrics(round=round, train={"a": {"train_loss": float("nan")}})
    return Progress(
        run_id="r", config_hash="c", round=round, best_round=best, best_value=0.5, initial_hash="i",
        sites={}, record=record, metrics=metrics,
    )  # fmt: skip


def save(folder: Path, round: int, keep: int = 9, best: int | None = None) -> None:
    save_checkpoint(folder, state_of(round), progress_of(round, best), keep)


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path: Path) -> None:
    save(tmp_path, 7, best=4)
    state, progress = load_checkpoint(tmp_path, 7)
    assert state.adapter.content_hash == state_of(7).adapter.content_hash
    assert state.residual.content_hash == state_of(7).residual.content_hash
    assert progress.model_dump_json() == progress_of(7, best=4).model_dump_json()
    assert np.isnan(progress.metrics.train["a"]["train_loss"])
    sums = (tmp_path / "checkpoint-7" / "SHA256SUMS").read_text()
    assert sorted(line.split("  ")[1] for line in sums.splitlines()) == ["progress.json", "state.safetensors"]


def truncate(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 1)


def flip(name: str, place: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[place] ^= 1
        (folder / name).write_bytes(data)

    return damage


def edit_round(folder: Path) -> None:
    text = (folder / "progress.json").read_text()
    assert '"round": 2' in text
    (folder / "progress.json").write_text(text.replace('"round": 2', '"round": 9'))


def rename(folder: Path) -> None:
    """What SHA256SUMS cannot see: checkpoint-2 is a copy of checkpoint-1."""
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("checkpoint-1"), folder)


DAMAGE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "truncated-state": (truncate("state.safetensors"), "file-changed", "state.safetensors"),
    "empty-state": (lambda f: os.truncate(f / "state.safetensors", 0), "file-changed", "state.safetensors"),
    "edited-array": (flip("state.safetensors", -1), "file-changed", "state.safetensors"),
    "edited-header": (flip("state.safetensors", 12), "file-changed", "state.safetensors"),
    "edited-progress": (edit_round, "file-changed", "progress.json"),
    "truncated-progress": (truncate("progress.json"), "file-changed", "progress.json"),
    "edited-sums": (flip("SHA256SUMS", 3), "file-changed", ""),
    "no-sums": (lambda f: (f / "SHA256SUMS").unlink(), "file-missing", ""),
    "no-state": (lambda f: (f / "state.safetensors").unlink(), "file-missing", ""),
    "no-progress": (lambda f: (f / "progress.json").unlink(), "file-missing", ""),
    "empty-sums": (lambda f: os.truncate(f / "SHA256SUMS", 0), "file-changed", ""),
    "strange-sums": (lambda f: (f / "SHA256SUMS").write_bytes(b"\xff\xfe\n"), "file-missing", ""),
    "nothing": (lambda f: [each.unlink() for each in f.iterdir()], "file-missing", ""),  # type: ignore[dict-item, return-value]
    "renamed": (rename, "renamed", "round 1"),
}


@pytest.mark.parametrize("done", DAMAGE)
def test_a_damaged_checkpoint_is_refused_with_the_reason_and_the_remedy(tmp_path: Path, done: str) -> None:
    damage, kind, named = DAMAGE[done]
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / "checkpoint-2")
    with refuses(CheckpointError, kind) as raised:
        load_checkpoint(tmp_path, 2)
    said = str(raised.value)
    assert str(tmp_path / "checkpoint-2") in said and named in said and "checkpoint-1" in said
    assert load_checkpoint(tmp_path, 1)[1].round == 1
    shutil.rmtree(tmp_path / "checkpoint-1")
    with refuses(CheckpointError, kind) as raised:
        load_checkpoint(tmp_path, 2)
    assert "checkpoint-1" not in str(raised.value), "there is none to go back to"


def test_every_byte_of_a_checkpoint_is_looked_at(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = tmp_path / "checkpoint-1"
    for name in ("state.safetensors", "progress.json", "SHA256SUMS"):
        data = (folder / name).read_bytes()
        for place in range(0, len(data), 11):
            flip(name, place)(folder)
            with pytest.raises(CheckpointError):
                load_checkpoint(tmp_path, 1)
            (folder / name).write_bytes(data)
    load_checkpoint(tmp_path, 1)


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    """Whole and unedited, but with a field that this version does not know how to do without."""
    write_folder(tmp_path / "checkpoint-1", files := {"state.safetensors": b"", "progress.json": b"{}"})
    import hashlib

    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items())
    (tmp_path / "checkpoint-1" / "SHA256SUMS").write_text(sums)
    with refuses(CheckpointError, "other-version"):
        load_checkpoint(tmp_path, 1)


def test_old_checkpoints_go_but_the_last_and_the_best_stay(tmp_path: Path) -> None:
    kept = []
    for round, best in enumerate((1, 1, 3, 3, 3, 6), start=1):
        save(tmp_path, round, keep=2, best=best)
        kept.append(list_checkpoints(tmp_path))
    assert kept == [[1], [1, 2], [1, 2, 3], [3, 4], [3, 4, 5], [3, 5, 6]] or kept == [
        [1], [1, 2], [2, 3], [3, 4], [3, 4, 5], [5, 6],
    ]  # fmt: skip
    (tmp_path / "checkpoint-x").mkdir()
    assert list_checkpoints(tmp_path) == kept[-1], "what is not a checkpoint is left alone"


def failing(calls: list[str], at: int, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    return call


def test_a_failure_at_any_point_of_writing_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let the 1st, 2nd, ... call to the disk fail, until none does."""
    for at in range(1, 30):
        folder = tmp_path / str(at)
        save(folder, 1)
        calls: list[str] = []
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", failing(calls, at, "fsync", os.fsync))
            patched.setattr(files, "opened", failing(calls, at, "open", files.opened))
            for name in ("rename", "mkdir"):
                patched.setattr(Path, name, failing(calls, at, name, getattr(Path, name)))
            try:
                save(folder, 2)
            except OutputError as error:
                assert "No space left on device" in str(error) and "--resume" in str(error)
            else:
                assert at > 6 and {"fsync", "rename", "mkdir", "open"} <= set(calls)
                assert len(calls) < at
                break
        # The name appears with the rename; only the sync of its folder comes after.
        rounds = list_checkpoints(folder)
        assert rounds in ([1], [1, 2])
        assert load_checkpoint(folder, rounds[-1])[1].round == rounds[-1]
        assert not list(folder.glob(".checkpoint*")), "half a checkpoint takes room that the rest needs"
        save(folder, 2)
        assert load_checkpoint(folder, 2)[1].round == 2
    else:
        pytest.fail("writing never succeeded")


def test_what_a_kill_left_behind_is_written_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    half = tmp_path / ".checkpoint-2.tmp"
    half.mkdir()
    (half / "state.safetensors").write_bytes(b"half")
    (half / "stray").write_bytes(b"")
    assert list_checkpoints(tmp_path) == [1]
    save(tmp_path, 2)
    assert load_checkpoint(tmp_path, 2)[1].round == 2
    assert sorted(path.name for path in (tmp_path / "checkpoint-2").iterdir()) == [
        "SHA256SUMS",
        "progress.json",
        "state.safetensors",
    ]


# --- Runs


class Stop:
    """A tracker that does something at one phase of one round."""

    def __init__(self, round: int, name: str, action: Callable[[], None]) -> None:
        self.when, self.action = (round, name), action

    def __call__(self, event: Event) -> None:
        now = (event.round, event.name) if isinstance(event, PhaseBegan) else None
        now = (event.record.round, "round") if isinstance(event, RoundDone) else now
        if now == self.when:
            self.action()


def interrupt() -> None:
    raise KeyboardInterrupt


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def finished() -> dict[str, tuple[Run, Result]]:
    """Whole runs by their configuration: many tests hold theirs against the same one."""
    return {}


@pytest.fixture
def play(
    make_run: Any,
    make_sites: Any,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    finished: dict[str, tuple[Run, Result]],
) -> Any:
    """Run, or go on with, a run of three rounds in the folder `out` with a fresh site process.

    What is called `whole` is run once and left as it is.
    """

    def run_it(out: str, *trackers: Any, resume: bool = False, **sections: Any) -> tuple[Run, Result]:
        if out == "whole":
            key = json.dumps(sections, sort_keys=True)
            if key not in finished:
                finished[key] = play_it(tmp_path_factory.mktemp(out), trackers, resume, sections)
            return finished[key]
        return play_it(tmp_path / out, trackers, resume, sections)

    def play_it(folder: Path, trackers: Any, resume: bool, sections: dict[str, Any]) -> tuple[Run, Result]:
        sections = dict(sections)
        sections["federation"] = {"rounds": ROUNDS, **sections.get("federation", {})}
        sections.setdefault("adapter", {"lora_dropout": 0.1})
        site = Site(make_sites(north=9, south=6))
        run = Run.open(site.prepare(make_run(**sections)), folder, resume=resume, trackers=trackers)
        return run, run_rounds(InProcessGrid(site, site.names), run)

    return run_it


def adapter_file(run: Run, result: Result) -> bytes:
    """The bytes of adapter/adapter_model.safetensors."""
    settings = run.config.adapter
    return as_lora(best_state(run, result), settings.r, settings.lora_alpha, settings.use_rslora)[
        0
    ].to_bytes()


def records(run: Run) -> list[dict[str, Any]]:
    """The lines of record.jsonl without what the clock decides (updates travel with their seconds)."""
    return [
        each.model_dump(exclude={"seconds", "bytes_up"})
        for each in read_jsonl(run.output_dir / RECORD_FILE, RoundRecord)
    ]


def assert_same_end(one: tuple[Run, Result], other: tuple[Run, Result]) -> None:
    assert one[1].state.stored().content_hash == other[1].state.stored().content_hash
    assert adapter_file(*one) == adapter_file(*other)
    assert records(one[0]) == records(other[0])
    lines = [(run.output_dir / METRICS_FILE).read_bytes() for run, _ in (one, other)]
    assert lines[0] == lines[1] and lines[0].count(b"\n") == ROUNDS
    assert list_checkpoints(one[0].output_dir) == list_checkpoints(other[0].output_dir)
    assert one[1].status == other[1].status == "done"


@pytest.mark.parametrize(
    ("rule", "optimizer"),
    [
        ("fedavg", "adamw_torch"),
        ("fedex", "sgd"),
        ("ffa", "adamw_torch"),
        pytest.param("fedavg", "sgd", marks=pytest.mark.slow),
        pytest.param("fedex", "adamw_torch", marks=pytest.mark.slow),
        pytest.param("ffa", "sgd", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_ends_bit_for_bit_where_the_other_ends(
    play: Any, tmp_path: Path, rule: str, optimizer: str
) -> None:
    sections = {
        "aggregation": {"name": rule},
        "training": {"optim": optimizer, "lr_scheduler_type": "cosine", "warmup_ratio": 0.2},
        "federation": {"sites_per_round": 2 if rule == "fedex" else 1},
    }
    whole = play("whole", **sections)
    assert bool(whole[1].state.residual) == (rule == "fedex")
    for after in range(1, ROUNDS):
        play(f"after-{after}", Stop(after + 1, "train", interrupt), **sections)
        assert list_checkpoints(tmp_path / f"after-{after}")[-1] == after
        assert_same_end(whole, play(f"after-{after}", resume=True, **sections))


def in_a_child(work: Callable[[], Any]) -> int:
    """Run `work` in a process of its own; returns the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


PHASES = [
    (0, "join"),
    (1, "train"),
    *((2, name) for name in ("cohort", "train", "aggregate", "evaluate", "checkpoint", "round")),
    (3, "checkpoint"),
    (3, "round"),
]


@pytest.mark.parametrize(("round", "phase"), PHASES)
def test_a_kill_in_any_phase_costs_the_round_in_flight_at_most(
    play: Any, tmp_path: Path, round: int, phase: str
) -> None:
    whole = play("whole", aggregation={"name": "fedex"})
    child = in_a_child(lambda: play("killed", Stop(round, phase, kill), aggregation={"name": "fedex"}))
    assert child == signal.SIGKILL
    folder = tmp_path / "killed"
    finished = round if phase == "round" else max(round - 1, 0)
    assert list_checkpoints(folder)[-1:] == ([finished] if finished else [])
    assert_same_end(whole, play("killed", resume=True, aggregation={"name": "fedex"}))


@pytest.mark.parametrize(
    "nth", [1, 4, 7, *(pytest.param(nth, marks=pytest.mark.slow) for nth in (2, 3, 5, 6))]
)
def test_a_kill_while_a_checkpoint_is_written_loses_nothing(
    play: Any, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """Kill at the nth call to fsync of the second round."""
    whole = play("whole")
    real, left = os.fsync, [nth]

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            kill()
        real(descriptor)

    def work() -> None:
        play("killed", Stop(2, "checkpoint", lambda: monkeypatch.setattr(os, "fsync", fsync)))

    assert in_a_child(work) == signal.SIGKILL
    assert_same_end(whole, play("killed", resume=True))


@pytest.mark.parametrize("tail", [b'{"round": 2, "coh', b'{"round":2,"train":{"\xc3', b"\0\0\0"])
def test_half_a_line_is_mended(play: Any, tail: bytes) -> None:
    whole = play("whole")
    run, _ = play("torn", Stop(2, "checkpoint", interrupt))
    for name in (RECORD_FILE, METRICS_FILE):
        with (run.output_dir / name).open("ab") as stream:
            stream.write(tail)
    assert_same_end(whole, play("torn", resume=True))


def test_a_line_that_nobody_wrote_is_named(play: Any) -> None:
    run, _ = play("edited", Stop(3, "train", interrupt))
    path = run.output_dir / METRICS_FILE
    path.write_bytes(b'{"round": "many"}\n' + path.read_bytes())
    with refuses(OutputError, "bad-line", where=f"{path}, line 1"):
        play("edited", resume=True)


def test_lines_are_told_apart_by_their_end_alone(tmp_path: Path) -> None:
    """Labels may hold characters that Python takes for the end of a line."""
    metrics = RoundMetrics(round=1, train={"a\u2028b\x85c": {"train_loss": 1.0}})
    path = tmp_path / METRICS_FILE
    path.write_text(metrics.model_dump_json() + "\n", encoding="utf-8")
    assert read_jsonl(path, RoundMetrics) == [metrics]


def test_a_damaged_checkpoint_can_be_deleted_to_go_on_from_the_one_before(play: Any) -> None:
    whole = play("whole")
    run, _ = play("damaged", Stop(3, "train", interrupt))
    truncate("state.safetensors")(run.output_dir / "checkpoint-2")
    with refuses(CheckpointError, "file-changed") as caught:
        play("damaged", resume=True)
    assert "checkpoint-2" in str(caught.value) and "checkpoint-1" in str(caught.value)
    shutil.rmtree(run.output_dir / "checkpoint-2")
    assert_same_end(whole, play("damaged", resume=True))


def test_a_run_that_is_done_stays_as_it_is(play: Any) -> None:
    whole = play("done")
    before = records(whole[0])
    again = play("done", resume=True)
    assert again[0].run_id == whole[0].run_id and records(again[0]) == before
    assert again[1].state.stored().content_hash == whole[1].state.stored().content_hash


def test_a_folder_with_a_run_is_not_written_over(play: Any) -> None:
    run, _ = play("first")
    before = {path: path.read_bytes() for path in run.output_dir.rglob("*") if path.is_file()}
    with refuses(OutputError, "run-in-folder") as caught:
        play("first")
    assert "--resume" in str(caught.value)
    assert before == {path: path.read_bytes() for path in run.output_dir.rglob("*") if path.is_file()}


def test_resuming_where_nothing_is_starts_the_run(play: Any) -> None:
    assert_same_end(play("whole"), play("new", resume=True))


def test_an_output_folder_that_cannot_be_made_is_named(play: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/out"):
        with refuses(OutputError, "folder-not-made") as caught:
            play(place)
        assert str(tmp_path / place) in str(caught.value)


def test_another_run_is_not_resumed(play: Any) -> None:
    run, _ = play("mine", Stop(3, "train", interrupt))
    with refuses(CheckpointError, "other-settings") as caught:
        play("mine", resume=True, training={"learning_rate": 0.5})
    assert "(training)" in str(caught.value)
    with refuses(CheckpointError, "other-settings") as caught:
        play("mine", resume=True, seed=4, federation={"grace_seconds": 1})
    assert "(seed, federation)" in str(caught.value)
    other, _ = play("other", Stop(3, "train", interrupt), seed=4)
    shutil.rmtree(run.output_dir / "checkpoint-2")
    shutil.copytree(other.output_dir / "checkpoint-2", run.output_dir / "checkpoint-2")
    with refuses(CheckpointError, "other-run") as caught:
        play("mine", resume=True)
    assert "checkpoint-2" in str(caught.value)
    assert (run.output_dir / RUN_FILE).exists()


@pytest.mark.parametrize("name", ["adapter", "record.jsonl", "events.jsonl", "summary.json"])
def test_what_another_program_left_is_not_written_over(play: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "out" / name).mkdir(parents=True)
    for resume in (False, True):
        with refuses(OutputError, "would-overwrite") as caught:
            play("out", resume=resume)
        assert name in str(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_sites_with_other_rows_than_before_are_named_on_resume(
    make_sites: Any, play: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run, _ = play("mine", Stop(2, "train", interrupt))
    play("mine", Stop(3, "train", interrupt), resume=True)
    assert "the rows of" not in caplog.text
    site = Site(make_sites(north=12, south=6, west=5))
    run_rounds(InProcessGrid(site, site.names), Run.open(run.config, run.output_dir, resume=True))
    assert "the rows of north, west are not those of the rounds before" in caplog.text


def test_sites_that_start_elsewhere_do_not_resume(
    make_run: Any, make_sites: Any, play: Any, tmp_path: Path
) -> None:
    run, _ = play("mine", Stop(2, "train", interrupt))

    class Elsewhere(Site):
        """A site process whose libraries draw another start from the same seed."""

        def handle_many(self, requests: Any) -> list[Any]:
            return [self.moved(update) for update in super().handle_many(requests)]

        def moved(self, update: Update) -> Update:
            start = load_model(run.config).initial.map(lambda _, array: array + np.float32(1))
            if update.header.phase == "join":
                return described(update, start_hash=start.content_hash)
            return edited(update, start) if update.header.phase == "start" else update

    site = Elsewhere(make_sites(north=9, south=6))
    again = Run.open(run.config, run.output_dir, resume=True)
    with refuses(CheckpointError, "other-start"):
        run_rounds(InProcessGrid(site, site.names), again)


def test_a_full_disk_ends_the_run_with_one_clear_error_and_it_can_go_on(play: Any, tmp_path: Path) -> None:
    """The system refuses to let a file grow, as a full disk does, from the second checkpoint on."""
    whole = play("whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with refuses(OutputError, "not-written") as caught:
            play(
                "full", Stop(2, "checkpoint", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (900, hard)))
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "checkpoint-2" in str(caught.value) and "--resume" in str(caught.value)
    folder = tmp_path / "full"
    assert list_checkpoints(folder) == [1] and not list(folder.glob(".checkpoint*"))
    assert load_checkpoint(folder, 1)[1].round == 1
    assert_same_end(whole, play("full", resume=True))


def test_a_disk_that_is_full_for_the_record_costs_nothing(play: Any) -> None:
    """The checkpoint fits, its line in record.jsonl does not."""
    whole = play("whole")
    run, _ = play("full", Stop(2, "train", interrupt))
    size = (run.output_dir / RECORD_FILE).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = Run.append

    def append(self: Run, record: RoundRecord, metrics: RoundMetrics) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
        real(self, record, metrics)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Run, "append", append)
        try:
            with refuses(OutputError, "not-written") as caught:
                play("full", resume=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert RECORD_FILE in str(caught.value) and list_checkpoints(run.output_dir)[-1] == 2
    assert_same_end(whole, play("full", resume=True))
