"""Flower's ClientApp: forwards one message to the resident site and its answer back. No torch here."""

from __future__ import annotations

import logging
import time

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from quorate.client.process.flower_messages import unwrap, wrap
from quorate.client.process.grpc_client import RemoteSite
from quorate.shared.errors import QuorateError

log = logging.getLogger(__name__)

FAILED = 1001
"""Flower error code for a request that could not be answered; the reason is our error code alone."""


def forward(message: Message, context: Context) -> Message:
    """Answer one Flower message. Text of an error stays here; its code travels."""
    try:
        with RemoteSite.from_environment() as site:
            reply = site.ask(unwrap(message.content), _time_left(message))
    except Exception as error:  # Flower would send the exception's text to the server
        log.exception("cannot answer a message")
        code = error.code if isinstance(error, QuorateError) else "internal"
        return Message(Error(FAILED, code), reply_to=message)
    return Message(wrap(reply), reply_to=message)


def _time_left(message: Message) -> float:
    """Return how long the server waits for an answer [s], never more than the message's ttl.

    The message was made by the server's clock; where this machine's is behind, the ttl bounds what is left.
    """
    metadata = message.metadata
    return min(metadata.ttl, metadata.created_at + metadata.ttl - time.time())


app = ClientApp()
app.query()(forward)
app.train()(forward)
app.evaluate()(forward)
