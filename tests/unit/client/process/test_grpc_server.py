"""The socket: bytes go there and back, what is wrong gets a status and a code, and turns are kept."""

from __future__ import annotations

import socket
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from loopback import wait_for
from refusals import refuses
from site_folder import RUN_ID, SITE

from quorate.client.process.grpc_client import CHUNK_BYTES, METHOD, RemoteSite, SiteUnavailable, chunks
from quorate.client.process.grpc_server import SiteService, check_health
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.errors import ConfigError, QuorateError
from quorate.shared.protocol.messages import RequestHeader, RoundRequest, Update

SECRET = "patient-4711"
LIMIT = 3 * CHUNK_BYTES


class Turns:
    """Answers with the arrays it was sent; holds each request until it is let go, if asked to."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.finished: list[int] = []
        self.holding = False
        self.began, self.let_go = threading.Event(), threading.Event()
        self.at_once = 0
        self._here = 0

    def answer(self, request: RoundRequest) -> Update:
        self._here += 1
        self.at_once = max(self.at_once, self._here)
        self.begun.append(request.header.round)
        self.began.set()
        if self.holding:
            assert self.let_go.wait(60)
        if request.header.run_config == "fail":
            raise ValueError(SECRET)
        self._here -= 1
        self.finished.append(request.header.round)
        return Update.reply(request, request.arrays)


def message(round: int = 1, size: int = 3, **fields: Any) -> bytes:
    header = {"run_id": RUN_ID, "phase": "fit", "site": SITE, "run_config": "{}", "config_hash": "0" * 64}
    arrays = Adapter({"a": np.arange(size, dtype=np.float32)})
    return RoundRequest(RequestHeader.model_validate({**header, "round": round, **fields}), arrays).encoded


@pytest.fixture
def turns() -> Turns:
    return Turns()


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s") / "site.sock"


@pytest.fixture
def service(turns: Turns, place: Path) -> Iterator[SiteService]:
    made = SiteService(turns.answer, SITE, place, max_bytes=LIMIT)
    made.start()
    yield made
    turns.let_go.set()
    made.stop()


@pytest.fixture
def remote(service: SiteService) -> Iterator[RemoteSite]:
    with RemoteSite(service.socket) as site:
        yield site


def test_many_chunks_go_there_and_back(remote: RemoteSite) -> None:
    sent = message(size=CHUNK_BYTES // 2)  # 2 MiB: three chunks with the header
    assert len(list(chunks(sent))) == 3
    update = Update.decode(remote.ask(sent, 30))
    assert update.arrays.content_hash == RoundRequest.decode(sent).arrays.content_hash


def test_the_client_app_finds_the_socket_by_its_variable(
    service: SiteService, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refuses(QuorateError, "no-resident-site") as caught:
        RemoteSite.from_environment()
    assert "QUORATE_SITE_SOCKET" in str(caught.value)
    monkeypatch.setenv("QUORATE_SITE_SOCKET", str(service.socket))
    with RemoteSite.from_environment() as site:
        reply = site.ask(message(site=""), 30)
    assert Update.decode(reply).header.site == SITE, "while joining, the site process says who it is"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "protocol"),
        (message()[:-1], "protocol"),
        (message()[: len(message()) // 2], "protocol"),
        (SECRET.encode() * 100, "protocol"),
        (message(site="south"), "protocol"),
        (message(run_config="fail"), "internal"),
        (b"x" * (LIMIT + 1), "oversized"),
    ],
)
def test_what_is_wrong_comes_back_as_a_code_alone(
    remote: RemoteSite, turns: Turns, data: bytes, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SiteUnavailable) as raised:
        remote.ask(data, 30)
    assert raised.value.code == code
    assert SECRET not in str(raised.value)
    if code != "internal":  # that one's traceback is for the log, and for it alone
        assert turns.begun == [] and SECRET not in caplog.text
    Update.decode(remote.ask(message(), 30))


def test_a_status_quotes_nothing(service: SiteService) -> None:
    with grpc.insecure_channel(f"unix:{service.socket}") as channel:
        with pytest.raises(grpc.RpcError) as raised:
            list(channel.stream_stream(METHOD)(chunks(message(run_config="fail")), timeout=30))
        assert (raised.value.code(), raised.value.details()) == (grpc.StatusCode.INTERNAL, "internal")
        with pytest.raises(grpc.RpcError) as raised:
            list(channel.stream_stream(METHOD)(iter([b"x" * 5 * CHUNK_BYTES]), timeout=30))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, "one chunk that is too large"
        with pytest.raises(grpc.RpcError) as raised:
            list(channel.stream_stream("/quorate.Site/Shell")(iter([b""]), timeout=30))
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_one_at_a_time_and_the_abandoned_are_not_begun(
    service: SiteService, turns: Turns, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns.holding = True
    waiting: list[Future[bytes]] = []
    submit = service._turns.submit

    def noted(*arguments: Any) -> Future[bytes]:
        waiting.append(submit(*arguments))
        return waiting[-1]

    monkeypatch.setattr(service._turns, "submit", noted)
    with grpc.insecure_channel(f"unix:{service.socket}") as channel:
        call = channel.stream_stream(METHOD)
        first = call(chunks(message(1)), timeout=60)
        assert turns.began.wait(30)
        cancelled = call(chunks(message(2)), timeout=60)
        wait_for(lambda: len(waiting) == 2, "the second was not queued", 30)
        expiring = call(chunks(message(3)), timeout=0.5)
        with pytest.raises(grpc.RpcError) as raised:
            list(expiring)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        cancelled.cancel()
        # A cancellation reaches the service a moment after cancel() returns.
        wait_for(lambda: all(each.cancelled() for each in waiting[1:]), "something still waits", 30)
        last = call(chunks(message(4)), timeout=60)
        assert turns.begun == [1]
        turns.let_go.set()
        assert [Update.decode(b"".join(each)).header.round for each in (first, last)] == [1, 4]
    assert turns.begun == turns.finished == [1, 4] and turns.at_once == 1


def test_one_that_has_begun_is_finished(service: SiteService, turns: Turns) -> None:
    turns.holding = True
    with grpc.insecure_channel(f"unix:{service.socket}") as channel:
        call = channel.stream_stream(METHOD)(chunks(message(1)), timeout=60)
        assert turns.began.wait(30)
        call.cancel()
        turns.let_go.set()
        list(channel.stream_stream(METHOD)(chunks(message(2)), timeout=60))
    assert turns.finished == [1, 2]


def test_the_caller_waits_for_a_site_that_starts_again(turns: Turns, place: Path) -> None:
    with RemoteSite(place) as remote:
        with pytest.raises(SiteUnavailable) as raised:
            remote.ask(message(), 0.5)
        assert raised.value.code == "expired"
        later = SiteService(turns.answer, SITE, place)
        timer = threading.Timer(1, later.start)
        timer.start()
        assert Update.decode(remote.ask(message(5), 60)).header.round == 5
        timer.join()
        later.stop()
        again = SiteService(turns.answer, SITE, place)
        again.start()
        assert Update.decode(remote.ask(message(6), 60)).header.round == 6
        again.stop()


def test_the_socket_is_the_groups_and_one_process_has_it(service: SiteService, turns: Turns) -> None:
    mode = service.socket.stat().st_mode
    assert stat.S_ISSOCK(mode) and mode & 0o777 == 0o660
    with refuses(ConfigError, "site-runs-already", str(service.socket)):
        SiteService(turns.answer, SITE, service.socket)
    assert check_health(service.socket)


def test_a_dead_processs_socket_is_replaced_and_nothing_else(turns: Turns, place: Path) -> None:
    assert not check_health(place, 0.5)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(place))
    made = SiteService(turns.answer, SITE, place)
    made.start()
    assert check_health(place)
    made.stop()
    assert not place.exists()
    place.write_text("a file")
    with refuses(ConfigError, "not-a-socket"):
        SiteService(turns.answer, SITE, place)
    assert place.read_text() == "a file"


def test_a_path_that_no_socket_can_have(turns: Turns, place: Path) -> None:
    long = place.parent / ("d" * 100) / "site.sock"
    with refuses(ConfigError, "socket-path-too-long", str(long)):
        SiteService(turns.answer, SITE, long)
    assert list(place.parent.iterdir()) == []


# When answers leave.


@pytest.mark.parametrize("code", [None, "internal"], ids=["answered", "failed"])
def test_answers_leave_on_a_grid(place: Path, turns: Turns, code: str | None) -> None:
    """Counted from the request's arrival, so that the work shows no finer than the grid."""
    made = SiteService(turns.answer, SITE, place, grid=lambda: 0.5)
    made.start()
    try:
        with RemoteSite(place) as site:
            started = time.monotonic()
            if code is None:
                site.ask(message())
            else:
                with pytest.raises(SiteUnavailable) as caught:
                    site.ask(message(run_config="fail"))
                assert caught.value.code == code
        assert time.monotonic() - started >= 0.5
        assert turns.begun == [1]
    finally:
        made.stop()
