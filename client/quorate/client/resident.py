"""The way from Flower to the resident site, in bytes.

In simulation the site lives in this process and is connected here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from quorate.shared.errors import QuorateError
from quorate.shared.messages import RoundRequest, Update


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


def answer(asked: Sequence[tuple[str, bytes]], handler: Handler | None = None) -> list[bytes]:
    """Answer messages.

    Args:
        asked: (name of the site that was asked, encoded request).
        handler: who answers; the connected one when left out.
    Returns: encoded updates, in order.
    Raises: QuorateError: nobody is connected. ProtocolError: a message cannot be read.
    """
    handler = handler or _connected
    if handler is None:
        raise QuorateError("no resident site is connected; start the site process first.")
    requests = [RoundRequest.decode(message).addressed_to(site) for site, message in asked]
    return [update.encoded for update in handler.handle(requests)]
