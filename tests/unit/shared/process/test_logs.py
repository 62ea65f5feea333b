"""Logs of supervised programs: times, rotation, and programs that nothing of it stops."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import wait_for
from small_disks import small_disk

from quorate.shared.process.log_keeper import FILES, MAX_BYTES, LogFile, Stream
from quorate.shared.process.logs import Logs
from quorate.shared.process.supervised import read_status, start_detached, stop

TIMED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ")
_SUPERVISED = """
import logging, sys
from pathlib import Path
from quorate.shared.process.supervisor import Program, Supervisor
logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
state = Path(sys.argv[1])
counts = "i=0; trap 'echo last words; exit 0' TERM; while true; do i=$((i+1)); echo line $i; sleep 0.05; done"
Supervisor(state, [Program("counter", ["sh", "-c", counts], state / "counter.log")]).run()
"""


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def keeper_of(pid: int) -> int:
    for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if b"log_keeper" in Path(f"/proc/{each}/cmdline").read_bytes():
            return int(each)
    return 0


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    command = [sys.executable, "-c", _SUPERVISED, str(tmp_path)]
    process = start_detached(
        command, tmp_path, tmp_path / "own.log", lambda: len(lines(tmp_path / "counter.log")) > 3, 60
    )
    yield tmp_path
    stop(tmp_path)
    process.wait(30)


def test_every_line_has_its_time(state: Path) -> None:
    stop(state)
    said = lines(state / "counter.log")
    assert all(TIMED.match(line) for line in said)
    assert [line[24:] for line in said] == [
        *(f"line {number}" for number in range(1, len(said))),
        "last words",
    ]
    own = lines(state / "own.log")
    assert all(TIMED.match(line) for line in own)
    assert own[0].endswith("counter started as process " + own[0].split()[-1])
    assert own[-1].endswith("INFO SIGTERM: stopping")


def test_who_says_the_time_himself_needs_no_other(tmp_path: Path) -> None:
    stream = Stream(LogFile(tmp_path / "x.log"))
    own = ["2026-11-28 07:49:35,123 INFO site ready", "2026/11/28 07:49:35 [warn] 1#1: nginx"]
    stream.take("".join(f"{each}\n" for each in own).encode() + b"none\nhal")
    stream.take(b"f\nrest")
    assert not stream.settle()
    *timed, none, half, rest = lines(tmp_path / "x.log")
    assert timed == own
    assert [TIMED.sub("", each) for each in (none, half, rest)] == ["none", "half", "rest"]
    assert all(map(TIMED.match, (none, half, rest)))


def test_files_are_bounded_in_size_and_number(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text("before\n")  # of a release without times
    stream = Stream(LogFile(path, max_bytes=1000, files=3))
    for number in range(200):
        stream.take(f"line {number:03d}\n".encode())
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["x.log", "x.log.1", "x.log.2"]
    assert all(file.stat().st_size <= 1000 for file in files)
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)
    kept = [line for file in reversed(files) for line in lines(file)]
    numbers = [int(line.split()[-1]) for line in kept]
    assert numbers == list(range(numbers[0], 200)) and numbers[0] > 0


def test_a_line_without_an_end_takes_no_memory(tmp_path: Path) -> None:
    stream = Stream(LogFile(tmp_path / "x.log"))
    for _ in range(100):
        stream.take(b"x" * 2**14)
    stream.settle()
    said = lines(tmp_path / "x.log")
    assert len(said) > 10 and sum(len(TIMED.sub("", line)) for line in said) == 100 * 2**14


def test_a_file_that_was_moved_away_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    stream = Stream(LogFile(path))
    stream.take(b"one\n")
    path.rename(tmp_path / "moved")
    stream.take(b"two\n")
    assert lines(path)[0].endswith(" two") and lines(tmp_path / "moved")[0].endswith(" one")


def test_a_full_disk_loses_lines_and_stops_nobody(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64 * 2**10) as disk:
        (disk / "ballast").write_bytes(b"x" * 40 * 2**10)
        stream = Stream(LogFile(disk / "x.log"))
        for number in range(1000):
            stream.take(f"{number:04d} {'x' * 60}\n".encode())
        (disk / "ballast").unlink()
        stream.take(b"room again\n")
        *before, note, last = [TIMED.sub("", line) for line in lines(disk / "x.log")]
        assert last == "room again"
        (lost,) = re.findall(r"^(\d+) lines before this one could not be written$", note)
        whole = [line for line in before if len(line) == 65]
        assert len(whole) >= 1 and len(whole) + int(lost) == 1000


def test_the_writer_of_logs_may_die_and_no_program_notices(state: Path) -> None:
    status = read_status(state)
    assert status is not None
    keeper = wait_for(lambda: keeper_of(status.pid), "no keeper")
    os.kill(keeper, signal.SIGKILL)
    wait_for(lambda: keeper_of(status.pid) not in (0, keeper), "it was not started again")
    written = len(lines(state / "counter.log"))
    wait_for(lambda: len(lines(state / "counter.log")) > written + 3, "nothing is written any more")
    again = read_status(state)
    assert again is not None and again.programs == status.programs
    assert "what writes the logs ended (-9)" in (state / "own.log").read_text()
    os.kill(wait_for(lambda: keeper_of(status.pid), "no keeper"), signal.SIGTERM)  # as systemd does
    assert stop(state)
    assert lines(state / "counter.log")[-1].endswith("last words")


def test_last_words_are_written_though_the_supervisor_was_killed(state: Path) -> None:
    status = read_status(state)
    assert status is not None
    keeper = wait_for(lambda: keeper_of(status.pid), "no keeper")
    os.kill(status.pid, signal.SIGKILL)
    wait_for(lambda: lines(state / "counter.log")[-1].endswith("last words"), "they were lost")
    wait_for(lambda: b"log_keeper" not in cmdline(keeper), "the keeper is left over")


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_a_log_is_there_before_anything_is_said(tmp_path: Path) -> None:
    logs = Logs([tmp_path / "x.log"])
    logs.close()
    assert (tmp_path / "x.log").read_bytes() == b""


def test_much_at_once_comes_through_whole(tmp_path: Path) -> None:
    logs = Logs([tmp_path / "x.log"])
    count = 200_000
    code = f"for n in range({count}): print('line', n)"
    subprocess.run([sys.executable, "-c", code], stdout=logs.into(tmp_path / "x.log"), check=True)
    logs.close()
    said = [line.split()[-1] for line in lines(tmp_path / "x.log")]
    assert said == [str(n) for n in range(count)]
    assert (tmp_path / "x.log").stat().st_size < MAX_BYTES and FILES > 1
