"""The supervisor with real processes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from refusals import refuses

from quorate.shared.errors import OutputError, QuorateError
from quorate.shared.process.supervised import ProgramStatus, Status, read_status, start_detached, stop
from quorate.shared.process.supervisor import Program, Supervisor

# One program that sleeps, and one that starts a child and tells its pid.
_CODE = """
import sys
from pathlib import Path
from quorate.shared.process.supervisor import Program, Supervisor
state = Path(sys.argv[1])
child = "sleep 600 & echo $! >> " + str(state / "children") + "; wait"
Supervisor(state, [
    Program("sleeper", ["sleep", "600"], state / "sleeper.log"),
    Program("parent", ["sh", "-c", child], state / "parent.log", kill_group=sys.argv[2] == "group"),
]).run()
"""


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids(state: Path) -> dict[str, int]:
    status = read_status(state)
    return {} if status is None else {name: p.pid for name, p in status.programs.items() if p.pid}


def children(state: Path) -> list[int]:
    path = state / "children"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.fixture(params=["group", "single"])
def state(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    command = [sys.executable, "-c", _CODE, str(tmp_path), request.param]
    process = start_detached(
        command,
        tmp_path,
        tmp_path / "out.log",
        lambda: len(pids(tmp_path)) == 2 and bool(children(tmp_path)),
        60,
    )
    yield tmp_path
    stop(tmp_path)
    process.wait(30)


def test_a_killed_program_is_started_again_and_counted(state: Path) -> None:
    before = pids(state)
    os.kill(before["sleeper"], signal.SIGKILL)
    wait_for(lambda: pids(state).get("sleeper", before["sleeper"]) != before["sleeper"])
    status = read_status(state)
    assert status is not None
    assert (status.programs["sleeper"].restarts, status.programs["sleeper"].last_exit) == (1, -9)
    assert pids(state)["parent"] == before["parent"]


def test_children_die_with_their_parent_only_where_asked(state: Path, request: pytest.FixtureRequest) -> None:
    (child,) = children(state)
    os.kill(pids(state)["parent"], signal.SIGKILL)
    wait_for(lambda: len(children(state)) == 2)
    assert alive(child) == (request.node.callspec.params["state"] == "single")
    assert stop(state)
    assert not any(alive(each) for each in children(state))  # whoever started them


def test_stop_ends_everything(state: Path) -> None:
    running = [*pids(state).values(), *children(state)]
    assert len(running) == 3
    assert stop(state)
    assert not any(alive(pid) for pid in running)
    assert read_status(state) is None
    assert not stop(state)  # nothing there any more


def test_two_supervisors_never_share_a_folder(state: Path) -> None:
    status = read_status(state)
    assert status is not None
    with refuses(OutputError, "running-already", where=str(state)) as caught:
        start_detached(["true"], state, state / "second.log", lambda: True, 5)
    assert f"(process {status.pid})" in str(caught.value)
    before = pids(state)
    code = subprocess.run([sys.executable, "-c", _CODE, str(state), "group"], capture_output=True, text=True)
    assert code.returncode != 0
    assert f"is running already (process {status.pid})" in code.stderr
    assert pids(state) == before


_BEGINS = _CODE.replace("Supervisor(state, [", "supervisor = Supervisor(state, [").replace("]).run()", "])")


def test_a_supervisor_that_has_begun_is_known_before_it_has_a_status(tmp_path: Path) -> None:
    code = _BEGINS + "Supervisor._write = lambda self: None\nsupervisor.run()"
    first = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), "group"])
    try:
        wait_for(lambda: read_status(tmp_path) is not None)
        assert read_status(tmp_path) == Status(pid=first.pid, programs={})
        with refuses(OutputError, "running-already", where=str(tmp_path)) as caught:
            start_detached(["true"], tmp_path, tmp_path / "out.log", lambda: True, 5)
        assert f"(process {first.pid})" in str(caught.value)
    finally:
        assert stop(tmp_path)
        assert first.wait(30) == 0
    assert read_status(tmp_path) is None


def test_a_supervisor_that_is_stopped_as_soon_as_it_is_known_ends_in_order(tmp_path: Path) -> None:
    slow = (
        "import time\nfrom quorate.shared.process import supervisor as module\nopened = module._logs\n"
        "module._logs = lambda files: time.sleep(1) or opened(files)\nsupervisor.run()"
    )
    first = subprocess.Popen([sys.executable, "-c", _BEGINS + slow, str(tmp_path), "group"])
    wait_for(lambda: read_status(tmp_path) is not None)
    assert stop(tmp_path)
    assert first.wait(30) == 0
    assert not (tmp_path / "children").exists()


def test_of_two_that_begin_at_once_one_is_told_of_the_other(tmp_path: Path) -> None:
    waits = "import time\nwhile not (state / 'go').exists(): time.sleep(0.1)\nsupervisor.run()"
    first: list[subprocess.Popen[bytes]] = []

    def other_was_faster() -> bool:
        if not first:
            first.append(subprocess.Popen([sys.executable, "-c", _CODE, str(tmp_path), "group"]))
            wait_for(lambda: read_status(tmp_path) is not None)
            (tmp_path / "go").touch()
        return False

    command = [sys.executable, "-c", _BEGINS + waits, str(tmp_path), "group"]
    try:
        with refuses(OutputError, "running-already") as caught:
            start_detached(command, tmp_path, tmp_path / "out.log", other_was_faster, 60)
        assert f"process {first[0].pid}" in str(caught.value)
    finally:
        stop(tmp_path)
        assert first[0].wait(30) == 0


def test_a_killed_supervisor_leaves_nothing_behind(state: Path) -> None:
    status = read_status(state)
    assert status is not None
    os.kill(status.pid, signal.SIGKILL)
    programs = [each.pid for each in status.programs.values()]
    wait_for(lambda: not any(alive(pid) for pid in programs if pid))
    assert read_status(state) is None  # though its file is still there
    assert Status.model_validate_json((state / "status.json").read_bytes()) == status
    for pid in children(state):  # the shell that started it was ended, it was not
        os.kill(pid, signal.SIGKILL)


def test_what_cannot_be_started_again_is_named_and_tried_again(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    code = """
import sys
from pathlib import Path
from quorate.shared.process.supervisor import Program, Supervisor
state = Path(sys.argv[1])
Supervisor(state, [
    Program("steady", ["sleep", "600"], state / "steady.log"),
    Program("placed", ["sleep", "600"], state / "placed.log", cwd=state / "place"),
]).run()
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = start_detached(command, tmp_path, tmp_path / "out.log", lambda: len(pids(tmp_path)) == 2, 60)
    before = pids(tmp_path)

    def placed() -> ProgramStatus:
        status = read_status(tmp_path)
        assert status is not None, (tmp_path / "out.log").read_text()
        return status.programs["placed"]

    try:
        place.rmdir()
        os.kill(before["placed"], signal.SIGKILL)
        wait_for(lambda: placed().problem is not None)
        assert str(placed().stopped).startswith("cannot be started (FileNotFoundError: ")
        assert pids(tmp_path) == {"steady": before["steady"]} and placed().last_exit == -9
        place.mkdir()
        wait_for(lambda: placed().pid is not None)
        assert (placed().problem, placed().restarts, placed().stopped) == (None, 1, None)
        assert pids(tmp_path)["steady"] == before["steady"]
    finally:
        stop(tmp_path)
        assert process.wait(30) == 0


STARTS = """
import os, sys, time
from pathlib import Path
from quorate.shared.process.supervisor import Program, Supervisor
state = Path(sys.argv[1])
os.register_at_fork(after_in_child=lambda: (state / "forked").touch())  # where Python runs after a fork
wish = "import ctypes, sys, time; wish = ctypes.c_int(); ctypes.CDLL(None).prctl(2, ctypes.byref(wish)); "
wish += "print(wish.value, sys.argv[1:], flush=True); time.sleep(600)"
look = 'grep SigIgn /proc/self/status; ls /proc/self/fd | wc -l; exec "$@"'
command = ["sh", "-c", look, "sh", sys.executable, "-c", wish, "an argument", "--"]
beside = lambda: time.sleep(600)
Supervisor(state, [Program("looks", command, state / "looks.log")], beside).run()
"""


PYTHONS_OWN = 1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1)


def ignored_by(status: str) -> int:
    """The mask of ignored signals in the text of /proc/PID/status, or a part of it."""
    (mask,) = re.findall(r"SigIgn:\s+([0-9a-f]+)", status)
    return int(mask, 16)


def test_beside_a_thread_a_program_starts_without_python_between_fork_and_exec(tmp_path: Path) -> None:
    command, log = [sys.executable, "-c", STARTS, str(tmp_path)], tmp_path / "looks.log"

    def said() -> list[str]:
        return [line.split(" ", 2)[2] for line in log.read_text().splitlines()] if log.exists() else []

    process = start_detached(command, tmp_path, tmp_path / "out.log", lambda: len(said()) == 3, 60)
    try:
        assert not (tmp_path / "forked").exists()
        ignored, descriptors, rest = said()
        # What comes ignored from whoever started the tests (`make`, nohup) stays so; Python's own does not.
        inherited = ignored_by(Path("/proc/self/status").read_text()) & ~PYTHONS_OWN
        assert ignored_by(ignored) & ~inherited == 0
        assert int(descriptors) == 4  # the folder that `ls` reads, besides the usual three
        assert rest == f"{int(signal.SIGTERM)} ['an argument', '--']"
    finally:
        assert stop(tmp_path) and process.wait(30) == 0


def test_what_cannot_be_started_at_all_ends_the_supervisor(tmp_path: Path) -> None:
    program = Program("none", [str(tmp_path / "nothing")], tmp_path / "none.log")
    with pytest.raises(FileNotFoundError):
        Supervisor(tmp_path, [program]).run()
    assert read_status(tmp_path) is None


def test_what_cannot_start_is_said(tmp_path: Path) -> None:
    with refuses(QuorateError, "ended-at-once") as caught:
        start_detached(["false"], tmp_path, tmp_path / "out.log", lambda: False, 30)
    assert "(1)" in str(caught.value) and str(tmp_path / "out.log") in str(caught.value)
    with refuses(QuorateError, "not-ready-in-time") as caught:
        start_detached(["sleep", "60"], tmp_path, tmp_path / "out.log", lambda: False, 1)
    assert " 1 s" in str(caught.value)
