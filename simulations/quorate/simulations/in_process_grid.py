"""Flower's Grid inside one process: messages go to the sites here, and replies come back at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from quorate.client.process.flower_app import SITE
from quorate.client.process.flower_messages import unwrap, wrap
from quorate.client.process.handler import Handler, answer
from quorate.server.exchange.flower_internals import FlowerRun, become_task, set_message_id

RUN_ID = 1
SERVER_NODE = 1
FIRST_SITE_NODE = 1001


class InProcessGrid(Grid):
    """A Grid whose nodes are sites in this process.

    Args:
        handler: answers for all sites.
        sites: names; node ids follow their order.
        client_app: when given, every message goes through this ClientApp one by one, as in production;
            else the messages of one push go to the handler together, so that the cohort trains as one stack.
    """

    def __init__(self, handler: Handler, sites: Sequence[str], client_app: ClientApp | None = None) -> None:
        self._handler = handler
        self._client_app = client_app
        self._sites = {FIRST_SITE_NODE + index: name for index, name in enumerate(sites)}
        self._replies: dict[str, Message] = {}
        self._ids = itertools.count(1)
        self._run = become_task(RUN_ID, SERVER_NODE)

    def set_run(self, run: FlowerRun) -> None:
        """Take over Flower's description of the run."""
        self._run = run

    @property
    def run(self) -> FlowerRun:
        """Flower's description of the run."""
        return self._run

    def get_node_ids(self) -> Iterable[int]:
        """Return the sites' node ids."""
        return list(self._sites)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message to one site."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer the messages and keep the replies until they are pulled."""
        pushed = list(messages)
        for message in pushed:
            set_message_id(message, f"message-{next(self._ids)}")
        if self._client_app is None:
            asked = [(self._sites[m.metadata.dst_node_id], unwrap(m.content)) for m in pushed]
            replies = [
                Message(wrap(reply), reply_to=message)
                for message, reply in zip(pushed, answer(asked, self._handler), strict=True)
            ]
        else:
            replies = [self._client_app(message, self._context(message)) for message in pushed]
        self._replies.update({m.metadata.message_id: r for m, r in zip(pushed, replies, strict=True)})
        return [message.metadata.message_id for message in pushed]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand out the replies to these messages, once."""
        return [self._replies.pop(each) for each in list(message_ids) if each in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push and pull in one go."""
        return self.pull_messages(self.push_messages(messages))

    def _context(self, message: Message) -> Context:
        node = message.metadata.dst_node_id
        return Context(RUN_ID, node, {SITE: self._sites[node]}, RecordDict(), {})
