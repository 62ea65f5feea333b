"""A GPU that is lost ends the site process; too little memory has a code, and a smaller stack is tried."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import answer_all
from loopback import wait_for
from site_folder import request, sha256_of, write_folder

from quorate.client.process.grpc_client import RemoteSite
from quorate.client.process.grpc_server import SiteService
from quorate.client.site import site as site_module
from quorate.client.site.device_errors import LOST_EXIT, of_device
from quorate.client.site.site import Site
from quorate.server.exchange.exclusions import REASONS
from quorate.server.exchange.join import request as ask
from quorate.server.rounds.run import Run
from quorate.shared.errors import ModelError
from quorate.shared.process.supervised import read_status
from quorate.shared.protocol.messages import RoundRequest, Update

LOST = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def cpu_memory() -> RuntimeError:
    """What torch raises on the CPU."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)
    return caught.value


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LOST, "device-lost"),
        (RuntimeError("CUDA error: device-side assert triggered"), "device-lost"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "device-lost"),
        (torch.AcceleratorError("CUDA error: out of memory"), "out-of-memory"),
        (FULL, "out-of-memory"),
        (cpu_memory(), "out-of-memory"),
        (MemoryError(), "out-of-memory"),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), None),
        (ValueError("a row says: CUDA error"), None),
    ],
    ids=str,
)
def test_errors_of_devices_and_memory_are_known(error: Exception, code: str | None) -> None:
    meant = of_device(error)
    assert (None if meant is None else meant.code) == code
    assert code is None or code in REASONS


@pytest.mark.parametrize(
    ("cause", "code"), [(LOST, "device-lost"), (FULL, "out-of-memory"), (KeyError(), None)]
)
def test_what_is_made_of_an_error_of_a_device_is_one(cause: Exception, code: str | None) -> None:
    error = ModelError("cannot be loaded")
    error.__cause__ = ModelError("cannot be put on the device")
    error.__cause__.__cause__ = cause
    meant = of_device(error)
    assert (None if meant is None else meant.code) == code


@pytest.fixture
def opened(make_run: Any, make_sites: Any, tmp_path: Path) -> Any:
    """Four sites and a run that stacks them."""
    names = {name: 9 for name in ("east", "north", "south", "west")}
    site = Site(make_sites(**names))
    run = Run(site.prepare(make_run(training={"max_stack": 4})), tmp_path, "0" * 16)
    (joined,) = answer_all(site, [ask(run, 0, "join", "north")])
    return site, [ask(run, 1, "fit", name, joined.arrays) for name in names]


def test_a_stack_without_memory_is_halved_and_answers_as_ever(opened: Any, monkeypatch: Any) -> None:
    """Two sites fit at a time; one of the four needs too much even alone."""
    site, asked = opened
    expected = answer_all(site, asked)
    right, tried = site_module.fit, []

    def fit(stack: Any, run: Any, round: Any, tasks: Any, *more: Any) -> Any:
        names = [task.site for task in tasks]
        tried.append(names)
        if len(names) > 2 or "west" in names:
            raise FULL
        return right(stack, run, round, tasks, *more)

    monkeypatch.setattr(site_module, "fit", fit)
    found = answer_all(site, asked)
    assert tried == [
        ["east", "north", "south", "west"],
        ["east", "north"],
        ["south", "west"],
        ["south"],
        ["west"],
    ]
    assert [update.header.error for update in found] == [None, None, None, "out-of-memory"]
    for update, known in zip(found[:3], expected[:3], strict=True):
        for name, array in update.arrays.items():
            assert abs(array - known.arrays[name]).max() < 1e-5


def test_a_lost_device_is_not_tried_again(opened: Any, monkeypatch: Any) -> None:
    site, asked = opened
    tried = []

    def fit(*arguments: Any) -> Any:
        tried.append(arguments)
        raise LOST

    monkeypatch.setattr(site_module, "fit", fit)
    assert {update.header.error for update in answer_all(site, asked)} == {"device-lost"}
    assert len(tried) == 1


def test_the_service_answers_and_then_asks_to_end(
    opened: Any, monkeypatch: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The grid of answers is not waited for: the process must not go before its answer."""
    site, asked = opened
    monkeypatch.setattr(site_module, "fit", lambda *_: (_ for _ in ()).throw(LOST))
    socket = tmp_path_factory.mktemp("s") / "site.sock"
    lost = threading.Event()

    def answer(message: RoundRequest) -> Update:
        return answer_all(site, [message])[0]

    service = SiteService(answer, "north", socket, grid=lambda: 3600, on_lost=lost.set)
    service.start()
    with RemoteSite(socket) as remote:
        reply = Update.decode(remote.ask(asked[1].encoded, 60))
    assert reply.header.error == "device-lost" and lost.wait(10)
    service.stop()


def restarts(place: Path) -> int:
    status = read_status(place / "watch")
    return 0 if status is None else status.programs["site"].restarts


@pytest.mark.slow
def test_a_site_process_that_lost_its_device_ends_and_is_started_again(
    tiny_bert: Path, make_run: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("site")
    folder = write_folder(place, tiny_bert)
    (place / "lost").touch()
    run = make_run(model={"model_name_or_path": "/nowhere", "sha256": sha256_of(tiny_bert)})
    program = Path(__file__).parents[3] / "helpers" / "serve_lost_device.py"
    code = (
        "import sys; from pathlib import Path; "
        "from quorate.shared.process.supervisor import Program, Supervisor; "
        "place = Path(sys.argv[1]); Supervisor(place / 'watch', [Program('site', "
        "[sys.executable, sys.argv[2], str(place)], place / 'site.log')]).run()"
    )
    watch = subprocess.Popen([sys.executable, "-c", code, str(place), str(program)], env=dict(os.environ))
    try:
        with RemoteSite(folder.socket) as remote:
            reply = Update.decode(remote.ask(request(run).encoded, 120))
            assert reply.header.error == "device-lost"
            wait_for(lambda: restarts(place) == 1, "the site process was not started again")
            status = read_status(place / "watch")
            assert status is not None and status.programs["site"].last_exit == LOST_EXIT
            again = Update.decode(remote.ask(request(run).encoded, 120))
        assert again.header.error is None and again.header.num_steps == 3
    finally:
        watch.send_signal(signal.SIGTERM)
        watch.wait(60)
