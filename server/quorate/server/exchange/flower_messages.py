"""The server's side of Flower: nodes, messages and waiting for replies, and nothing of ours decided here."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping

from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from quorate.server.exchange.flower_internals import ObjectPushError
from quorate.shared.errors import OutputError, ProtocolError
from quorate.shared.protocol.messages import ARRAY, ERROR_CODE, RECORD, RoundRequest, Update
from quorate.shared.protocol.phases import Phase

_TYPES: Mapping[Phase, str] = {
    "join": MessageType.QUERY,
    "start": MessageType.QUERY,
    "statistics": MessageType.QUERY,
    "fit": MessageType.TRAIN,
    "evaluate": MessageType.EVALUATE,
    "alone": MessageType.TRAIN,
    "finish": MessageType.QUERY,
}
log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
PUSHES = 5
"""How often messages are brought to a SuperLink that takes only part of them."""
UNREACHABLE = "unreachable"
"""Code of a message that Flower could not bring, or of an error of Flower's own."""


class Open(dict[str, int]):
    """Id of a message without a reply -> the node it went to."""

    def pull(self, grid: Grid) -> Iterator[tuple[int, bytes | str]]:
        """Yield (node, message bytes or error code) of the replies that are there now, and take them out.

        A reply is matched on the message it answers, as Flower's own errors carry no node.
        """
        if not self:
            return
        for message in list(grid.pull_messages(list(self))):
            node = self.pop(message.metadata.reply_to_message_id, None)
            if node is not None:
                yield node, _content(message)

    def forget(self, node: int) -> None:
        """Take the messages to this node out."""
        for message in [message for message, to in self.items() if to == node]:
            del self[message]


class QuorateGrid(Grid):
    """A grid whose messages are made as Flower's own makes them."""

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)


class Exchange:
    """Messages to nodes, and their replies. A node may be sent the same message more than once.

    Args:
        grid: carries them.
        ttl: seconds after which a node drops a message; Flower's own default is 12 hours, and a slow node
            would then work stale requests off one by one.
    """

    def __init__(self, grid: Grid, ttl: float) -> None:
        self._grid = grid
        self._ttl = ttl
        self._open = Open()

    @property
    def waiting(self) -> set[int]:
        return set(self._open.values())

    def send(self, requests: Mapping[int, RoundRequest]) -> None:
        """Push one request per node (node id -> request).

        Raises: OutputError: the SuperLink does not take them.
        """
        messages = []
        for node, request in requests.items():
            data = request.encoded
            array = Array(dtype="uint8", shape=(len(data),), stype="safetensors", data=data)
            content = RecordDict({RECORD: ArrayRecord({ARRAY: array})})
            kind, group = _TYPES[request.header.phase], str(request.header.round)
            messages.append(self._grid.create_message(content, kind, node, group, self._ttl))
        if messages:
            self._open.update(zip(push(self._grid, messages), requests, strict=True))

    def pull(self) -> Iterator[tuple[int, bytes | str]]:
        """Yield (node, message bytes or error code) of the replies that are there now."""
        return self._open.pull(self._grid)

    def settle(self, node: int) -> None:
        """Wait for no further reply of this node."""
        self._open.forget(node)

    def leave(self) -> Open:
        """Give up on all that is open; returns it."""
        left, self._open = self._open, Open()
        return left


def push(grid: Grid, messages: list[Message]) -> Iterable[str]:
    """Push messages and return their ids, again where the SuperLink took only part of them.

    A SuperLink that is killed after it stored a part and before it said so refuses that part when Flower
    brings it again. The same messages a second time keep their ids, and only what is missing is stored.

    Raises: OutputError: it did not take them `PUSHES` times.
    """
    for _ in range(PUSHES):
        try:
            return grid.push_messages(messages)
        except ObjectPushError as error:
            refused = error
            log.warning("the SuperLink did not take a part of the messages; sending them again")
            time.sleep(POLL_SECONDS)
    raise OutputError(
        f"the SuperLink did not store messages in {PUSHES} attempts; see its log (full disk?), and continue "
        "the run with --resume."
    ) from refused


def _content(message: Message) -> bytes | str:
    if message.has_error():
        # Our ClientApp gives a code as the reason; Flower gives sentences, or the text of an exception.
        reason = message.error.reason or ""
        return reason if re.fullmatch(ERROR_CODE, reason) else UNREACHABLE
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
