"""Flower's Grid inside one process: messages go to the sites here, and are answered when they are pulled."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from itertools import tee

from flwr.app import Message

from quorate.client.process.flower_messages import unwrap, wrap
from quorate.client.site.engine import Engine, in_stacks
from quorate.server.exchange.flower_internals import FlowerRun, become_task, set_message_id
from quorate.server.exchange.flower_messages import QuorateGrid
from quorate.shared.protocol.messages import RoundRequest

RUN_ID = 1
SERVER_NODE = 1
FIRST_SITE_NODE = 1001


class InProcessGrid(QuorateGrid):
    """A Grid whose nodes are sites in this process.

    A pull answers the next stack (`training.max_stack`) of the messages that it names, in the order in which
    they were pushed: whoever adds updates up as they come holds one stack of them, and not the cohort's.

    Args:
        engine: answers for all sites.
        sites: names; node ids follow their order.
    """

    def __init__(self, engine: Engine, sites: Sequence[str]) -> None:
        self._engine = engine
        self._sites = {FIRST_SITE_NODE + index: name for index, name in enumerate(sites)}
        self._pushed: dict[str, Message] = {}
        self._ids = itertools.count(1)
        self._run = become_task(RUN_ID, SERVER_NODE)

    def set_run(self, run: FlowerRun) -> None:
        self._run = run

    @property
    def run(self) -> FlowerRun:
        return self._run

    def get_node_ids(self) -> Iterable[int]:
        return list(self._sites)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep the messages until their answers are asked for."""
        pushed = list(messages)
        for message in pushed:
            set_message_id(message, f"message-{next(self._ids)}")
        self._pushed.update({message.metadata.message_id: message for message in pushed})
        return [message.metadata.message_id for message in pushed]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Answer the next stack of these messages; an empty list where all of them have been answered."""
        asked = set(message_ids)
        waiting = (message for each, message in self._pushed.items() if each in asked)
        replies = self._answered(waiting)
        for reply in replies:
            del self._pushed[reply.metadata.reply_to_message_id]
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        asked, replies = self.push_messages(messages), list[Message]()
        while stack := list(self.pull_messages(asked)):
            replies += stack
        return replies

    def _answered(self, waiting: Iterator[Message]) -> list[Message]:
        """Return the replies to the first stack of messages; one without a request in it raises."""
        waiting, asked = tee(waiting)
        requests = (
            RoundRequest.decode(unwrap(message.content)).addressed_to(
                self._sites[message.metadata.dst_node_id]
            )
            for message in waiting
        )
        updates = next(in_stacks(self._engine, requests), [])
        return [
            Message(wrap(update.encoded), reply_to=message)
            for update, message in zip(updates, asked, strict=False)
        ]
