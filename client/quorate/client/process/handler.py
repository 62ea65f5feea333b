"""The way from Flower to the resident site, in bytes. No torch here.

In simulation the site lives in this process and is connected here. In production it is a process of its own
behind a Unix socket, and bytes pass through unread.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from quorate.client.process.grpc_client import RemoteSite
from quorate.shared.errors import QuorateError
from quorate.shared.protocol.messages import RoundRequest, Update, UpdateHeader

log = logging.getLogger(__name__)


class Handler(Protocol):
    """The seam: whoever answers requests."""

    def handle(self, requests: list[RoundRequest]) -> list[Update]:
        """Answer requests in order."""
        ...


_connected: Handler | None = None


def connect(handler: Handler | None) -> None:
    """Make `handler` the one that this process's ClientApp forwards to; None disconnects."""
    global _connected
    _connected = handler


def answer(
    asked: Sequence[tuple[str, bytes]], handler: Handler | None = None, timeout: float | None = None
) -> list[bytes]:
    """Answer messages.

    Args:
        asked: (name of the site that was asked, encoded request). A site process knows its own name.
        handler: who answers; when left out the connected one, else the site process behind the socket that
            QUORATE_SITE_SOCKET names.
        timeout: how long a site process may take, and may be waited for while it starts again [s].
    Returns: encoded updates, in order.
    Raises: QuorateError: there is neither, or the site process gave an error code instead of an answer.
        ProtocolError: a message cannot be read.
    """
    handler = handler or _connected
    if handler is None:
        with RemoteSite.from_environment() as site:
            return [site.ask(message, timeout) for _, message in asked]
    requests = [RoundRequest.decode(message).addressed_to(site) for site, message in asked]
    return [update.encoded for update in handler.handle(requests)]


class Failed(Update):
    """An answer that is a code alone.

    Args:
        header: with the code.
        why: the same in words, which stay here.
    """

    def __init__(self, header: UpdateHeader, why: str) -> None:
        super().__init__(header)
        self.why = why


def failed(request: RoundRequest, error: Exception) -> Failed:
    """Return the answer of a site that could not do what was asked: a code. The text goes to the log here."""
    code = error.code if isinstance(error, QuorateError) else "internal"
    log.error(
        "site %s, run %.66r, round %d, %s: %s",
        request.header.site,
        request.header.run_id,
        request.header.round,
        request.header.phase,
        error,
        exc_info=code == "internal",
    )
    return Failed(Update.reply(request, error=code).header, str(error))
