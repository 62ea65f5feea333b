"""The run controller against real processes that hold a run's folder as a ServerApp does, and die as one may.

Flower's part, what starts such a process and knows whether it goes on, is a fork here;
`tests/contract/test_flower_control.py` asks a real SuperLink.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from refusals import refuses
from report_data import TIMEOUT, Shape, config, make_summary, record, round_metrics
from rich.console import Console

from quorate.deploy.cli import run as quorate
from quorate.deploy.control import run_controller, run_outputs
from quorate.deploy.control.flower_cli import Flower, FlowerState, ServerNotUp
from quorate.deploy.control.follower import Follower, joining_table
from quorate.deploy.control.run_controller import Controller
from quorate.deploy.control.run_list import RunFolder, find_run_folder
from quorate.server.federation.folder import FederationFolder
from quorate.server.rounds.run import locked_output
from quorate.server.tracking.events import (
    EVENTS_FILE,
    Event,
    EventsReader,
    EventsTracker,
    Finished,
    RoundDone,
    Started,
)
from quorate.server.tracking.run_status import RunStatus
from quorate.shared.errors import CheckpointError, ConfigError, ModelError, OutputError, QuorateError
from quorate.shared.process.files import write_folder

SHAPE = Shape(rounds=2, planned=2, references=())
RUN = config(SHAPE)
ROUNDS = [(record(SHAPE, r), round_metrics(RUN, SHAPE, r)) for r in (1, 2)]
SUMMARY = make_summary(RUN, SHAPE, *map(list, zip(*ROUNDS, strict=True)))
FEDERATION = "name: trial\nserver: {hostname: localhost}\nsites: [cancer, heart]\n"
Work = Callable[[EventsTracker, Path], None]
FORK = multiprocessing.get_context("fork")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def round_of(number: int) -> Work:
    def work(events: EventsTracker, run_dir: Path) -> None:
        write_folder(run_dir / f"checkpoint-{number}", {"state": b""})
        done, metrics = ROUNDS[number - 1]
        events(RoundDone(record=done, metrics=metrics))

    return work


def killed(*before: Work) -> Work:
    """A ServerApp that is killed after this."""

    def work(events: EventsTracker, run_dir: Path) -> None:
        for each in before:
            each(events, run_dir)
        die()

    return work


def done(events: EventsTracker, run_dir: Path) -> None:
    round_of(2)(events, run_dir)
    events(Finished(summary=SUMMARY))


def never_ends(events: EventsTracker, run_dir: Path) -> None:
    time.sleep(60)


class Forks(Flower):
    """Flower's part: every submission is the next piece of work, in a process of its own.

    A piece of work that is a state is a submission that never gets that far, of which Flower says this.
    """

    def __init__(self, run_dir: Path, work: list[Work | FlowerState | type[ServerNotUp]]) -> None:
        super().__init__(run_dir, "trial")
        self.__dict__.update(run_dir=run_dir, work=work, started=[], states={})

    def submit(self, bundle: Path, run_id: str) -> int:
        work = self.__dict__["work"].pop(0)
        if work is ServerNotUp:
            raise ServerNotUp("not up")
        number = len(self.__dict__["states"]) + 1
        self.__dict__["states"][number] = "running" if callable(work) else work
        if callable(work):
            process = FORK.Process(target=self._serve, args=(number, work))
            process.start()
            self.__dict__["started"].append(process)
        return number

    def state(self, flower_run_id: int) -> FlowerState:
        state: FlowerState = self.__dict__["states"][flower_run_id]
        return state

    def stop(self, flower_run_id: int) -> None:
        if self.__dict__["started"]:
            self.__dict__["started"][-1].terminate()
        self.__dict__["states"][flower_run_id] = "stopped"

    def _serve(self, number: int, work: Work) -> None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        run_dir: Path = self.__dict__["run_dir"]
        events = EventsTracker(run_dir / EVENTS_FILE)
        with locked_output(run_dir):
            RunStatus(state="running", flower_run_id=number).write(run_dir)
            try:
                events(
                    Started(
                        run=RUN,
                        run_id=run_dir.name,
                        output_dir=str(run_dir),
                        sites=SUMMARY.sites,
                        resumed_from=RunFolder(run_dir).rounds_done,
                    )
                )
                work(events, run_dir)
                ended = RunStatus(state="done", exit_code=0, flower_run_id=number)
            except KeyboardInterrupt:
                ended = RunStatus(state="interrupted", exit_code=130, flower_run_id=number)
            ended.write(run_dir)
        os._exit(0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "PATIENCE_SECONDS": 0.2,
        "ASK_SECONDS": (0.05, 0.05),
        "BACK_OFF": (0.01, 0.01),
        "POLL_SECONDS": 0.02,
    }.items():
        monkeypatch.setattr(run_controller, name, value)


@pytest.fixture
def folder(tmp_path: Path) -> FederationFolder:
    (tmp_path / "trial").mkdir()
    (tmp_path / "trial" / "federation.yaml").write_text(FEDERATION)
    return FederationFolder(tmp_path / "trial")


class Carried:
    """A new run, with the controller over it."""

    def __init__(self, folder: FederationFolder, *work: Any, max_restarts: int = 3) -> None:
        self.run = run_outputs.new_run(folder, RUN, folder.path / "out")
        self.said: list[str] = []
        self.events: list[Event] = []
        self.flower = Forks(self.run.path, list(work))
        self.controller = self.another(max_restarts)

    def another(self, max_restarts: int = 3) -> Controller:
        return Controller(
            self.run,
            self.flower,
            on_event=self.events.append,
            say=self.said.append,
            max_restarts=max_restarts,
        )

    @property
    def told(self) -> list[str]:
        return [each.event for each in self.events]


def test_a_run_that_ends_is_followed_to_its_end(folder: FederationFolder) -> None:
    carried = Carried(folder, done)
    assert carried.controller.carry_out().state == "done"
    assert carried.told == ["start", "round", "finish"] and carried.said == []
    assert carried.run.state == "done" and carried.run.path.stat().st_mode & 0o077 == 0


def test_a_run_that_is_killed_is_submitted_again_and_says_where_it_stands(folder: FederationFolder) -> None:
    carried = Carried(folder, killed(), "failed", "unknown", killed(round_of(1)), ServerNotUp, done)
    ended = carried.controller.carry_out()
    assert (ended.state, ended.flower_run_id) == ("done", 5)
    assert carried.told == ["start", "start", "round", "start", "round", "finish"]
    assert [line for line in carried.said if "lost" in line] == [
        "the run was lost: its ServerApp died; submitting it again, it goes on from the beginning",
        "the run was lost: its ServerApp died; submitting it again, it goes on from the beginning",
        "the run was lost: the SuperLink has lost it; submitting it again, it goes on from the beginning",
        "the run was lost: its ServerApp died; submitting it again, it goes on after round 1",
    ]
    assert "the server does not answer; waiting for it" in carried.said
    assert carried.run.flower_run == 5


def test_a_run_that_gets_nowhere_is_given_up_and_one_that_gets_on_is_not(folder: FederationFolder) -> None:
    carried = Carried(folder, killed(), killed(), killed(), done, max_restarts=2)
    with refuses(QuorateError, "lost-too-often") as error:
        carried.controller.carry_out()
    assert "3 times" in str(error.value) and "--resume" in str(error.value) and carried.run.state == "lost"

    work = [killed(), killed(round_of(1)), killed(), done]
    assert Carried(folder, *work, max_restarts=2).controller.carry_out().state == "done"


def test_stop_waits_for_what_the_run_writes_and_a_run_that_never_began_is_stopped_too(
    folder: FederationFolder,
) -> None:
    carried = Carried(folder, never_ends)
    carried.controller._submit()
    while not (carried.run.path / EVENTS_FILE).exists():
        time.sleep(0.02)
    assert carried.run.occupied and carried.run.state == "running"
    ended = carried.controller.stop()
    assert ended is not None and (ended.state, ended.exit_code) == ("interrupted", 130)
    assert carried.run.state == "interrupted" and carried.told == ["start"]

    waiting = Carried(folder, "pending")
    waiting.controller._submit()
    assert waiting.run.state == "waiting"
    ended = waiting.controller.stop()
    assert ended is not None and ended.state == "interrupted" == waiting.run.state


def test_a_run_stopped_by_somebody_else_ends_the_command(folder: FederationFolder) -> None:
    assert Carried(folder, "stopped").controller.carry_out().state == "interrupted"


def test_a_run_that_is_under_way_is_followed_not_submitted_again(folder: FederationFolder) -> None:
    def slow(events: EventsTracker, run_dir: Path) -> None:
        time.sleep(0.5)
        done(events, run_dir)

    carried = Carried(folder, slow)
    carried.controller._submit()
    while carried.run.state != "running":
        time.sleep(0.02)
    assert carried.another().carry_out().flower_run_id == 1
    assert "under way" in carried.said[0] and carried.told[-2:] == ["round", "finish"]


def test_a_server_that_is_not_up_at_first_is_said_and_leaves_no_run(folder: FederationFolder) -> None:
    carried = Carried(folder, ServerNotUp)
    with pytest.raises(ServerNotUp):
        carried.controller.carry_out()
    assert not carried.controller.submitted
    run_outputs.forget(carried.run)
    assert list(folder.runs.iterdir()) == []


def test_runs_are_found_by_id_and_by_settings(folder: FederationFolder, tmp_path: Path) -> None:
    first, second = (run_outputs.new_run(folder, RUN, tmp_path / name) for name in ("one", "two"))
    assert find_run_folder(folder, second.run_id[:12]) == second
    for wrong in ("", "zzz"):
        with refuses(ConfigError, "no-such-run"):
            find_run_folder(folder, wrong)
    assert run_outputs.old_run(folder, RUN, tmp_path / "two", None) == second  # the newest
    other = RUN.model_copy(update={"seed": 8})
    with refuses(ConfigError, "none-to-resume"):
        run_outputs.old_run(folder, other, tmp_path / "two", None)
    with refuses(CheckpointError, "run-has-other-settings") as caught:
        run_outputs.old_run(folder, other, tmp_path / "two", first.run_id)
    assert "(seed)" in str(caught.value)


def test_what_a_federation_cannot_do_is_said_before_anything_is_sent(
    tmp_path: Path, make_run: Any, tiny_bert: Path
) -> None:
    assert run_outputs.pinned(RUN) is RUN
    sha256 = run_outputs.pinned(make_run()).model.sha256
    assert (
        sha256 is not None and run_outputs.pinned(make_run(model={"sha256": sha256})).model.sha256 == sha256
    )
    with refuses(ModelError, "no-hash") as caught:
        run_outputs.pinned(make_run(model={"model_name_or_path": str(tmp_path / "missing")}))
    assert "model.sha256" in str(caught.value)

    out = tmp_path / "out"
    run_outputs.check_output(out, RUN, resume=False)
    (out / "adapter").mkdir(parents=True)
    with refuses(OutputError, "would-overwrite"):
        run_outputs.check_output(out, RUN, resume=False)


def test_an_adapter_that_a_run_took_away_is_taken_away_from_its_results(
    folder: FederationFolder, tmp_path: Path
) -> None:
    run = run_outputs.new_run(folder, RUN, tmp_path / "out")
    write_folder(tmp_path / "out" / "adapter", {"adapter_model.safetensors": b"fetched before"})
    (run.path / "summary.json").write_text("{}")
    run_outputs.fetch_results(run, tmp_path / "out")
    assert not (tmp_path / "out" / "adapter").exists()


def test_results_are_fetched_without_checkpoints(folder: FederationFolder, tmp_path: Path) -> None:
    run = run_outputs.new_run(folder, RUN, tmp_path / "out")
    write_folder(run.path / "checkpoint-1", {"state": b""})
    write_folder(run.path / "adapter", {"adapter_model.safetensors": b"new"})
    write_folder(tmp_path / "out" / "adapter", {"left.over": b"old"})
    EventsTracker(run.path / EVENTS_FILE)(Finished(summary=SUMMARY))
    run_outputs.fetch_results(run, tmp_path / "out")
    assert [each.event for each in EventsReader(tmp_path / "out" / EVENTS_FILE).read()] == ["finish"]
    assert (tmp_path / "out" / EVENTS_FILE).stat().st_mode & 0o077 == 0
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert {"run.yaml", "adapter/adapter_model.safetensors"} <= found
    assert not any("checkpoint" in name or "left" in name or "control" in name for name in found)
    with refuses(OutputError, "run-in-folder"):
        run_outputs.check_output(tmp_path / "out", RUN, resume=False)
    run_outputs.check_output(tmp_path / "out", RUN, resume=True)


FOLLOWER = """
import sys, time
from pathlib import Path
from quorate.deploy.control.run_list import RunFolder

with RunFolder(Path(sys.argv[1])).follow():
    print("following", flush=True)
    time.sleep(600)
"""


def test_a_run_whose_command_was_killed_is_said_to_be_alone(
    folder: FederationFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    carried = Carried(folder, never_ends)
    name = ["--federation", str(folder.path)]

    def listed() -> dict[str, Any]:
        assert quorate(["runs", "list", *name, "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)["runs"]
        return dict(found)

    carried.controller._submit()
    while not (carried.run.path / EVENTS_FILE).exists():
        time.sleep(0.02)
    assert listed()["command"] == "gone"
    with ExitStack() as stack:
        commands = []
        for _ in range(2):
            command = [sys.executable, "-c", FOLLOWER, str(carried.run.path)]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            assert process.stdout is not None and process.stdout.readline() == "following\n"
            commands.append(process)
        for each in commands:
            assert (listed()["state"], listed()["command"]) == ("running", "follows")
            each.kill()
            each.wait()
    found = listed()
    assert (found["state"], found["command"]) == ("running", "gone")
    assert datetime.fromisoformat(found["heard"]).timestamp() <= time.time()
    assert quorate(["runs", "list", *name]) == 0
    assert "running, alone" in (told := capsys.readouterr().out) and "quorate runs stop" in told
    assert quorate(["runs", "show", carried.run.run_id, *name]) == 0
    assert "gone" in capsys.readouterr().out
    assert carried.controller.stop() is not None
    assert listed()["command"] is None, "a run that has ended needs no command"


def test_the_controller_follows_as_long_as_it_carries_out(folder: FederationFolder) -> None:
    def slow(events: EventsTracker, run_dir: Path) -> None:
        time.sleep(0.5)
        done(events, run_dir)

    carried, seen = Carried(folder, slow), list[bool | None]()
    carried.controller._on_event = lambda _event: seen.append(carried.run.followed)
    assert carried.controller.carry_out().state == "done"
    assert seen and all(seen) and carried.run.followed is False


def test_the_table_shows_who_joined_and_who_did_not() -> None:
    out = io.StringIO()
    sites = dict(list(SUMMARY.sites.items())[:1])
    sites["\x1b[2Jodd"] = next(iter(sites.values()))
    Console(file=out, width=200).print(joining_table(sites, {"away": TIMEOUT}, "0" * 64))
    text = out.getvalue()
    assert "\x1b" not in text and "odd" in text
    assert "cancer" in text and "joined" in text and "differs" in text and "treatment 5" in text
    assert "away" in text and "did not reply in time" in text


def test_commands_show_the_runs(
    folder: FederationFolder, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    name = ["--federation", str(folder.path)]
    assert quorate(["runs", "list", *name]) == 0
    assert "no runs yet" in capsys.readouterr().out
    carried = Carried(folder, done)
    carried.controller.carry_out()
    assert quorate(["runs", "list", *name, "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["runs"]
    expected = {"id": carried.run.run_id, "name": "example", "state": "done", "round": 2, "rounds": 2}
    assert {key: listed[key] for key in expected} == expected
    assert quorate(["runs", "show", carried.run.run_id[:6], *name]) == 0
    assert "done" in capsys.readouterr().out
    assert quorate(["runs", "logs", carried.run.run_id, "-f", *name]) == 0
    text = capsys.readouterr().out
    assert "round 2/2" in text and "joined" in text

    out = io.StringIO()
    follower = Follower(Console(file=out, width=110))
    for event in carried.events:
        follower(event)
    assert out.getvalue() == text  # what the command that started the run has shown

    assert quorate(["runs", "stop", carried.run.run_id, *name]) == 2
    assert "nothing to stop" in capsys.readouterr().err
