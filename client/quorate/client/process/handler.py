"""The way from Flower to the resident site, in bytes. No torch here.

In simulation the site lives in this process and is connected here. In production it is a process of its own
behind a Unix socket, and bytes pass through unread.
"""

from __future__ import annotations

from collections.abc import Sequence

from quorate.client.process.grpc_client import RemoteSite
from quorate.client.site.engine import Engine, answer_all
from quorate.shared.protocol.messages import RoundRequest

_connected: Engine | None = None


def connect(engine: Engine | None) -> None:
    """Make `engine` the one that this process's ClientApp forwards to; None disconnects."""
    global _connected
    _connected = engine


def answer(asked: Sequence[tuple[str, bytes]], timeout: float | None = None) -> list[bytes]:
    """Answer messages by the connected engine, else by the site process behind QUORATE_SITE_SOCKET.

    Args:
        asked: (name of the site that was asked, encoded request). A site process knows its own name.
        timeout: how long a site process may take, and may be waited for while it starts again [s].
    Returns: encoded updates, in order.
    Raises: QuorateError: there is neither, or the site process gave an error code instead of an answer.
        ProtocolError: a message cannot be read.
    """
    if _connected is None:
        with RemoteSite.from_environment() as site:
            return [site.ask(message, timeout) for _, message in asked]
    requests = [RoundRequest.decode(message).addressed_to(site) for site, message in asked]
    return [update.encoded for update in answer_all(_connected, requests)]
