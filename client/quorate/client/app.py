"""Flower's ClientApp: forwards one message to the resident site and its answer back."""

from __future__ import annotations

import logging

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from quorate.client.flower import unwrap, wrap
from quorate.client.resident import answer
from quorate.shared.errors import QuorateError

log = logging.getLogger(__name__)

SITE = "site"
"""Key of Flower's node configuration that names the site."""
FAILED = 1001
"""Flower error code for a request that could not be answered; the reason is our error code alone."""


def forward(message: Message, context: Context) -> Message:
    """Answer one Flower message. Text of an error stays here; its code travels."""
    try:
        (reply,) = answer([(str(context.node_config[SITE]), unwrap(message.content))])
    except Exception as error:  # Flower would send the exception's text to the server
        log.exception("cannot answer a message")
        code = error.code if isinstance(error, QuorateError) else "internal"
        return Message(Error(FAILED, code), reply_to=message)
    return Message(wrap(reply), reply_to=message)


app = ClientApp()
app.query()(forward)
app.train()(forward)
app.evaluate()(forward)
