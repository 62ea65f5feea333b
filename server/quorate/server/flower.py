"""The server's side of Flower: nodes, messages and waiting for replies, and nothing of ours decided here."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping

from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from quorate.shared.errors import ProtocolError
from quorate.shared.messages import ARRAY, ERROR_CODE, RECORD, Phase, RoundRequest, Update

_TYPES: Mapping[Phase, str] = {
    "join": MessageType.QUERY,
    "fit": MessageType.TRAIN,
    "evaluate": MessageType.EVALUATE,
    "finish": MessageType.QUERY,
}
POLL_SECONDS = 0.5


def send(grid: Grid, requests: Mapping[int, RoundRequest], ttl: float) -> dict[str, int]:
    """Push one request per node.

    Args:
        requests: node id -> request.
        ttl: seconds after which a node drops the message; Flower's own default is 12 hours, and a slow node
            would then work stale requests off one by one.
    Returns: Flower's message id -> node id. A reply is matched on the message it answers, as Flower's own
        errors carry no node.
    """
    messages = []
    for node, request in requests.items():
        data = request.encoded
        array = Array(dtype="uint8", shape=(len(data),), stype="safetensors", data=data)
        content = RecordDict({RECORD: ArrayRecord({ARRAY: array})})
        group = str(request.header.round)
        messages.append(grid.create_message(content, _TYPES[request.header.phase], node, group, ttl))
    return dict(zip(grid.push_messages(messages), requests, strict=True))


def replies(grid: Grid, sent: Mapping[str, int], deadline: float) -> Iterator[tuple[int, bytes | str] | None]:
    """Yield (node, message bytes or error code) as replies arrive, and None while there is nothing.

    Ends when every node has replied or `deadline` (`time.monotonic`) has passed. The caller looks at the
    clock at each None.
    """
    waiting = dict(sent)
    while waiting:
        for message in grid.pull_messages(list(waiting)):
            node = waiting.pop(message.metadata.reply_to_message_id)
            yield node, _content(message)
        left = deadline - time.monotonic()
        if not waiting or left <= 0:
            return
        yield None
        time.sleep(min(POLL_SECONDS, left))


def _content(message: Message) -> bytes | str:
    if message.has_error():
        # Our ClientApp gives a code as the reason; Flower gives sentences, or the text of an exception.
        reason = message.error.reason or ""
        return reason if re.fullmatch(ERROR_CODE, reason) else "unreachable"
    record = message.content.array_records.get(RECORD)
    return "protocol" if record is None or ARRAY not in record else bytes(record[ARRAY].data)


def decode(content: bytes | str) -> Update | str:
    """Return the Update, or an error code where there is none."""
    if isinstance(content, str):
        return content
    try:
        update = Update.decode(content)
    except ProtocolError as error:
        return error.code
    return update.header.error or update
