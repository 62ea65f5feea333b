"""The resident site's gRPC service on a Unix socket: `quorate.Site/Handle`, and the standard health service.

One request is worked on at a time, in the order of arrival, as training is serial. A request that is
abandoned (deadline passed, call cancelled, caller dead) before its turn is not begun; one that has begun is
finished, and its answer stored, so that it is not in vain when the request comes again. What is wrong with a
message leaves as a gRPC status and an error code, never as text.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from quorate.client.process.grpc_client import MAX_BYTES, METHOD, chunks
from quorate.client.site.device_errors import DEVICE_LOST
from quorate.shared.errors import ConfigError, ProtocolError, QuorateError
from quorate.shared.process.files import holder, take_lock
from quorate.shared.protocol.messages import RoundRequest, Update

log = logging.getLogger(__name__)

SERVICE, _, _ = METHOD.removeprefix("/").partition("/")
MODEL = "quorate.BaseModel"
"""Name in the health service that serves while a base model is loaded."""
_WAITING = 16
"""Calls that are held open at a time; further ones, health checks too, wait."""
_LONGEST_PATH = 100
"""A Unix socket's path has 108 bytes in Linux's own structure, with its end."""


class Stopped(BaseException):
    """Ends the work at hand when the process is told to end.

    No Exception, so that nothing takes it for a failure of the request: it is asked again of the next
    process.
    """


class SiteService:
    """The service of one site.

    Args:
        site: this site's name; a request for another one is refused.
        socket: where to listen; a dead process's socket is replaced.
        max_bytes: largest message that is read.
        grid: answers leave at whole multiples of so many seconds after their request came; 0: at once. Asked
            for each answer.
        on_lost: told when the site has lost its device: the answer that says so is the last one, and the
            process is to end.
    Raises: ConfigError: another process has the socket, or it cannot be made.
    """

    def __init__(
        self,
        answer: Callable[[RoundRequest], Update],
        site: str,
        socket: Path,
        *,
        max_bytes: int = MAX_BYTES,
        grid: Callable[[], float] = lambda: 0.0,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._answer = answer
        self._site = site
        self._max_bytes = max_bytes
        self._grid = grid
        self._on_lost = on_lost
        self._stopping = threading.Event()
        self._turns = ThreadPoolExecutor(1, thread_name_prefix="site")
        self._health = health.HealthServicer()
        self.socket = socket.absolute()
        self._lock = _claim(self.socket)
        self._server = grpc.server(ThreadPoolExecutor(_WAITING), options=[("grpc.so_reuseport", 0)])
        rpc = grpc.stream_stream_rpc_method_handler(self._handle)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, {"Handle": rpc}),)
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    def start(self) -> None:
        """Listen, and say so to health checks.

        Raises: ConfigError: the socket cannot be made.
        """
        before = os.umask(0o117)  # owner and group alone, from the first moment on
        try:
            self._server.add_insecure_port(f"unix:{self.socket}")
        except RuntimeError as error:
            raise ConfigError(f"{self.socket}: cannot listen there ({error}); look at its folder.") from error
        finally:
            os.umask(before)
        self.socket.chmod(0o660)
        self._server.start()
        for name in ("", SERVICE):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self.model_loaded(False)

    def model_loaded(self, loaded: bool) -> None:
        """Tell health checks whether a base model is in memory."""
        status = health_pb2.HealthCheckResponse
        self._health.set(MODEL, status.SERVING if loaded else status.NOT_SERVING)

    def check_stopping(self, _event: object = None) -> None:
        """Raise Stopped once the process is told to end; to be called at every optimiser step."""
        if self._stopping.is_set():
            raise Stopped

    def stop(self) -> None:
        """Take no more requests, end training at its next step, and remove the socket."""
        self._stopping.set()
        self._health.enter_graceful_shutdown()
        self._turns.shutdown(wait=True, cancel_futures=True)
        self._server.stop(grace=1).wait()
        self.socket.unlink(missing_ok=True)
        os.close(self._lock)

    def _handle(self, incoming: Iterator[bytes], context: Any) -> Iterator[bytes]:
        data = self._read(incoming, context)
        if data is None:
            return
        came = time.monotonic()
        try:
            future = self._turns.submit(self._work, data)
        except RuntimeError:  # shut down
            context.abort(grpc.StatusCode.UNAVAILABLE, "stopping")
        settled, gone = threading.Event(), threading.Event()
        future.add_done_callback(lambda _: settled.set())

        def abandoned() -> None:
            future.cancel()  # does nothing once it has begun
            gone.set()
            settled.set()

        if not context.add_callback(abandoned):
            abandoned()
        settled.wait()
        grid = self._grid()
        if grid and not self._stopping.is_set():
            gone.wait(-(time.monotonic() - came) % grid)
        if not context.is_active():
            return
        yield from chunks(self._outcome(future, context))

    def _read(self, incoming: Iterator[bytes], context: Any) -> bytearray | None:
        """Return the whole message; None when the caller has gone meanwhile."""
        data = bytearray()
        try:
            for chunk in incoming:
                data += chunk
                if len(data) > self._max_bytes:
                    break
        except grpc.RpcError:
            return None
        if len(data) > self._max_bytes:
            log.error(
                "refused a message of more than %d bytes; raise no limit: ask who sent it", self._max_bytes
            )
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "oversized")
        return data if context.is_active() else None

    def _work(self, data: bytearray) -> bytes:
        if self._stopping.is_set():
            raise Stopped
        request = RoundRequest.decode(bytes(data)).addressed_to(self._site)
        update = self._answer(request)
        if update.header.error == DEVICE_LOST:
            log.error("the device is lost; ending, so that another process takes over")
            self._stopping.set()  # whatever waits is asked of that one
            self._on_lost()
        return update.encoded

    def _outcome(self, future: Future[bytes], context: Any) -> bytes:
        if future.cancelled():
            context.abort(grpc.StatusCode.UNAVAILABLE, "stopping")
        error = future.exception()
        if isinstance(error, Stopped):
            context.abort(grpc.StatusCode.UNAVAILABLE, "stopping")
        if isinstance(error, ProtocolError):
            log.error("refused a message: %s", error)
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.code)
        if error is not None:
            log.error("cannot answer a message", exc_info=error)
            code = error.code if isinstance(error, QuorateError) else "internal"
            context.abort(grpc.StatusCode.INTERNAL, code)
        return future.result()


def check_health(socket: Path, timeout: float = 5.0, *, name: str = SERVICE) -> bool:
    """Whether a site process listens on `socket` and takes requests; with MODEL, whether it holds a model."""
    with grpc.insecure_channel(
        f"unix:{socket.absolute()}", options=[("grpc.enable_http_proxy", 0)]
    ) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            reply = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=timeout)
        except grpc.RpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def _claim(socket: Path) -> int:
    """Take the lock beside the socket and clear away what a dead process left; returns the descriptor.

    The lock is the system's and is gone with its process, however that ends: whoever has it is the live one.
    """
    if len(os.fsencode(socket)) > _LONGEST_PATH:
        raise ConfigError(
            f"{socket}: a socket's path may have {_LONGEST_PATH} bytes; set `state` in site.yaml to a folder "
            "with a shorter path.",
            kind="socket-path-too-long",
        )
    try:
        lock = os.open(socket.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"{socket.parent}: {error.strerror}; make it writable for this process.") from error
    try:
        take_lock(lock)
        if socket.exists() and not stat.S_ISSOCK(socket.stat().st_mode):
            raise ConfigError(f"{socket} is no socket; move it away.", kind="not-a-socket")
        socket.unlink(missing_ok=True)
    except BlockingIOError as error:
        os.close(lock)
        pid = holder(socket.with_suffix(".lock"))
        process = f" (process {pid})" if pid else ""
        message = f"{socket}: a site process is running there already{process}; stop that one first."
        raise ConfigError(message, kind="site-runs-already") from error
    except BaseException:
        os.close(lock)
        raise
    return lock
