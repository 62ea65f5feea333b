"""What keeps tasks' tokens out of the process list, against Flower's own executor and its own programs."""

from __future__ import annotations

import importlib
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from flwr.common.args import try_obtain_flwr_app_token
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType
from refusals import refuses

from quorate.client.flower.flower_internals import EXECUTOR
from quorate.client.node.users import SystemUser, reads
from quorate.shared.errors import QuorateError
from quorate.shared.process import heartbeat, task_token

TOKEN = secrets.token_hex(128)
# What a program sees of itself in its first moment, and what it reads as Flower's programs do.
COMMAND = """#!/bin/sh
tr '\\0' '\\n' < /proc/$$/cmdline > {out}/arguments.part
while [ $# -gt 0 ]; do [ "$1" = --token-file ] && cat "$2" > {out}/token; shift; done
mv {out}/arguments.part {out}/arguments
exec sleep 60
"""


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = importlib.import_module(EXECUTOR)
    monkeypatch.setattr(module, "subprocess", module.subprocess)  # given back after the test
    task_token.install(module)
    return module


def specification(task_type: TaskType) -> Any:
    types = importlib.import_module("flwr.supercore.superexec.executor.types")
    return types.ExecutionSpec(
        task_type=task_type,
        runtime_api_address="127.0.0.1:9",
        token=TOKEN,
        insecure=True,
        root_certificates_path=None,
        runtime_dependency_install=False,
        parent_pid=os.getpid(),
        suppress_output=True,
        task_id=1,
    )


@pytest.fixture(params=list(TaskType))
def started(
    executor: Any, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[int, list[str]]]:
    """A program that Flower's executor has started: its process id and its arguments."""
    path = tmp_path / TASK_TYPE_TO_COMMAND[request.param]
    path.write_text(COMMAND.format(out=tmp_path))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    processes: list[Any] = []
    start = executor.subprocess.Popen
    executor.subprocess.Popen = lambda *a, **k: processes.append(start(*a, **k))
    try:
        executor.SubprocessExecutor().launch(specification(request.param))
        deadline = time.monotonic() + 60
        while not (tmp_path / "arguments").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield processes[0].pid, (tmp_path / "arguments").read_text().splitlines()
    finally:
        processes[0].kill()
        processes[0].wait()


def test_a_program_gets_its_token_but_not_as_an_argument(
    started: tuple[int, list[str]], tmp_path: Path
) -> None:
    _, arguments = started
    assert (tmp_path / "token").read_text() == TOKEN
    assert TOKEN not in " ".join(arguments)
    assert not re.search("[0-9a-f]{64}", " ".join(arguments))
    assert arguments[-3:] == ["--insecure", "--parent-pid", str(os.getpid())]


def test_nobody_else_can_open_what_the_argument_names(started: tuple[int, list[str]]) -> None:
    pid, arguments = started
    number = arguments[arguments.index("--token-file") + 1].rpartition("/")[2]
    path = Path(f"/proc/{pid}/fd/{number}")
    assert path.read_text() == TOKEN and path.stat().st_mode & 0o777 == 0o600
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    assert reads(SystemUser.named("nobody"), [path, Path(f"/proc/{pid}/cmdline")]) == [False, True]


def test_nothing_of_the_token_stays_open_in_the_superexec(started: tuple[int, list[str]]) -> None:
    names = []
    for each in Path("/proc/self/fd").iterdir():
        if each.is_symlink():
            names.append(str(each.readlink()))
    assert not [name for name in names if "task-token" in name]


@pytest.mark.parametrize(
    ("module", "parser"),
    [
        ("flwr.supernode.cli.flwr_clientapp", "_parse_args_run_flwr_clientapp"),
        ("flwr.superlink.cli.flwr_serverapp", "_parse_args_run_flwr_serverapp"),
    ],
)
def test_flowers_programs_read_a_token_from_memory(module: str, parser: str) -> None:
    parse = getattr(importlib.import_module(module), parser)()
    with task_token._in_memory(TOKEN) as descriptor:
        arguments = parse.parse_args(["--insecure", "--token-file", f"/proc/self/fd/{descriptor}"])
        assert try_obtain_flwr_app_token(arguments) == TOKEN


@pytest.mark.parametrize("missing", ["subprocess", "Popen"])
def test_a_flower_that_starts_programs_in_another_way_is_not_run(missing: str) -> None:
    code = SimpleNamespace(co_names=[name for name in ("subprocess", "Popen") if name != missing])
    changed = ModuleType("changed")
    changed.SubprocessExecutor = SimpleNamespace(launch=SimpleNamespace(__code__=code))  # type: ignore[attr-defined]
    with refuses(QuorateError, "moved-launch") as caught:
        task_token.install(changed)
    assert missing in str(caught.value)
    with refuses(QuorateError, "moved-launch"):
        task_token.install(ModuleType("empty"))


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ([], "no-token"),
        (["--token"], "no-token"),
        ([f"--token={TOKEN}"], "no-token"),
        (["--token", TOKEN, "--again", TOKEN], "token-twice"),
        (["--token", TOKEN, "--token", TOKEN], "no-token"),
    ],
)
def test_a_flower_that_gives_the_token_in_another_way_starts_nothing(
    executor: Any, arguments: list[str], kind: str
) -> None:
    with refuses(QuorateError, kind):
        executor.subprocess.Popen(["flwr-clientapp", *arguments])


def test_the_early_heartbeat_carries_the_token_of_the_file() -> None:
    seen: list[str | None] = []

    class Runtime(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.headers[heartbeat.TOKEN_HEADER])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Runtime) as server, task_token._in_memory(TOKEN) as descriptor:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        arguments = ["--insecure", "--runtime-api-address", f"127.0.0.1:{server.server_address[1]}"]
        with heartbeat.beating("flwr-clientapp", [*arguments, "--token-file", f"/proc/self/fd/{descriptor}"]):
            thread.join(30)
    assert seen == [TOKEN]


def test_both_sides_start_a_superexec_that_hides_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(EXECUTOR)
    monkeypatch.setattr(module, "subprocess", module.subprocess)
    from quorate.deploy.server import flower_main

    flower_main.load("flower-superexec", [])
    assert module.subprocess.Popen is task_token._start
    from quorate.client.flower import run_superexec
    from quorate.client.node import names, programs

    for name, value in names.QUIET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "subprocess", importlib.import_module("subprocess"))
    cli = importlib.import_module("flwr.supercore.cli")
    monkeypatch.setattr(cli, "flower_superexec", lambda: None)
    run_superexec.main()
    assert module.subprocess.Popen is task_token._start
    assert (sys.executable, "-P", "-m", run_superexec.__name__) == programs._SUPEREXEC
