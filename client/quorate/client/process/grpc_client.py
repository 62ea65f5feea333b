"""The ClientApp's side of the socket: bytes to the resident site process, and its answer back.

Flower starts a process for every message, so nothing heavy is imported here.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from quorate.shared.errors import QuorateError
from quorate.shared.protocol.messages import ERROR_CODE

log = logging.getLogger(__name__)

SOCKET = "QUORATE_SITE_SOCKET"
"""Environment variable: the site process's Unix socket."""
METHOD = "/quorate.Site/Handle"
"""One request in, one answer out, each as a stream of chunks."""
CHUNK_BYTES = 2**20
"""Bytes per gRPC message, well under its default limit of 4 MiB."""
MAX_BYTES = 900_000_000
"""Largest message either way. An answer is stored as one SQLite value, which holds 1e9 bytes at most; LoRA of
rank 64 on every linear layer of a 7B model is 640 MB in float32."""
_PAUSE_SECONDS = 0.5
# gRPC's own pauses between attempts to connect grow to two minutes.
_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A proxy is for the network, not for this socket.
    ("grpc.enable_http_proxy", 0),
)


class SiteUnavailable(QuorateError):
    """The site process gave no answer; `code` says why.

    Args:
        reason: for the log here.
        code: what may leave the site.
    """

    code = "unreachable"

    def __init__(self, reason: str, *, code: str = "unreachable") -> None:
        super().__init__(reason)
        self.code = code


class RemoteSite:
    """A resident site process behind a Unix socket; closed by `with`."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._channel = grpc.insecure_channel(f"unix:{socket.absolute()}", options=_OPTIONS)
        self._handle = self._channel.stream_stream(METHOD)

    @classmethod
    def from_environment(cls) -> RemoteSite:
        """Return the site that QUORATE_SITE_SOCKET names.

        Raises: QuorateError: it is not set, and so no site is connected.
        """
        socket = os.environ.get(SOCKET)
        if not socket:
            raise QuorateError(
                f"no resident site is connected; start the site process, and set {SOCKET} to its socket.",
                kind="no-resident-site",
            )
        return cls(Path(socket))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def ask(self, message: bytes, timeout: float | None = None) -> bytes:
        """Forward one request and return the answer, both as encoded messages.

        A site process that is down, or goes down meanwhile, is asked again when it is up: an answer that it
        stored comes back as it was, and one that it had not finished it begins again.

        Args:
            message: an encoded RoundRequest.
            timeout: from now until there must be an answer [s]; for ever when left out.
        Raises: SiteUnavailable: the site process gave an error code, or nothing in time.
        """
        if len(message) > MAX_BYTES:
            raise SiteUnavailable(
                f"a request of {len(message)} bytes; at most {MAX_BYTES} go to the site process.",
                code="oversized",
            )
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise SiteUnavailable(
                    f"{self._socket}: the site process gave no answer within {timeout:.0f} s; see its log, "
                    "and check that it runs.",
                    code="expired",
                )
            try:
                return b"".join(self._handle(chunks(message), timeout=left, wait_for_ready=True))
            except grpc.RpcError as error:
                self._judge(error)
            time.sleep(_PAUSE_SECONDS)

    def _judge(self, error: grpc.RpcError) -> None:
        """Return where asking again makes sense; raise what the site process said otherwise."""
        status, details = error.code(), error.details() or ""
        if status is grpc.StatusCode.UNAVAILABLE:
            log.info("%s: the site process is not there (%s); waiting for it", self._socket, details)
            return
        if status is grpc.StatusCode.DEADLINE_EXCEEDED:
            return  # the loop's own clock ends it
        code = details if re.fullmatch(ERROR_CODE, details) else "internal"
        message = f"{self._socket}: {status.name}, {code}; see the log of the site process."
        raise SiteUnavailable(message, code=code)


def chunks(message: bytes) -> Iterator[bytes]:
    """Cut a message into what gRPC takes; an empty one is one empty chunk."""
    for start in range(0, len(message) or 1, CHUNK_BYTES):
        yield message[start : start + CHUNK_BYTES]
