"""Grids on which answers arrive in any order, and on which sites drop, delay or spoil what they send."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flwr.app import Error, Message

from quorate.client.process.flower_messages import unwrap, wrap
from quorate.client.site.engine import Engine
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.protocol.messages import RoundRequest, Update
from quorate.simulations.in_process_grid import InProcessGrid

Change = Callable[[Update], Update | bytes | Error | None]
SIZES = {"north": 12, "south": 7, "west": 5}
NAMES = {1001: "north", 1002: "south", 1003: "west"}


class Shuffled(InProcessGrid):
    """A grid whose sites all work at once, as in production: who answers first is chance (seeded)."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        asked, replies = list(message_ids), list[Message]()
        while stack := list(super().pull_messages(asked)):
            replies += stack
        random.Random(len(replies)).shuffle(replies)
        return replies


class Tampered(Shuffled):
    """A grid on which `change` puts something in the place of each update, or nothing (None).

    Args:
        late: site -> pulls for which its updates to training are held back.
    """

    def __init__(self, engine: Engine, change: Change, late: dict[str, int] | None = None) -> None:
        super().__init__(engine, engine.names)
        self.change, self.late = change, late or {}
        self.asked: dict[str, Message] = {}
        self.requests: list[RoundRequest] = []
        self.updates: list[Update] = []
        self.held: list[tuple[int, Message]] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = list(messages)
        ids = list(super().push_messages(pushed))
        self.asked.update(zip(ids, pushed, strict=True))
        self.requests += [RoundRequest.decode(unwrap(message.content)) for message in pushed]
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.held = [(pulls - 1, message) for pulls, message in self.held]
        out = [message for pulls, message in self.held if pulls <= 0]
        self.held = [(pulls, message) for pulls, message in self.held if pulls > 0]
        for message in super().pull_messages(message_ids):
            update = Update.decode(unwrap(message.content))
            self.updates.append(update)
            changed = self.change(update)
            if changed is None:
                continue
            if isinstance(changed, Error):
                message = Message(changed, reply_to=self.asked[message.metadata.reply_to_message_id])
            else:
                message.content = wrap(changed if isinstance(changed, bytes) else changed.encoded)
            if update.header.phase == "fit" and self.late.get(update.header.site):
                self.held.append((self.late[update.header.site], message))
            else:
                out.append(message)
        return out


def edited(update: Update, arrays: Adapter | None = None, **header: Any) -> Update:
    """The update as a site that does not check itself would send it."""
    return Update(
        update.header.model_copy(update=header), update.arrays if arrays is None else Adapter(arrays)
    )


def described(update: Update, **fields: Any) -> Update:
    """The answer to `join` of a site that says something else of itself."""
    assert update.header.description is not None
    return edited(update, description=update.header.description.model_copy(update=fields))


def only(site: str, change: Change, phase: str = "fit", round: int | None = None) -> Change:
    """Apply `change` to one site's updates alone."""

    def pick(update: Update) -> Update | bytes | Error | None:
        header = update.header
        hit = header.site == site and header.phase == phase and round in (None, header.round)
        return change(update) if hit else update

    return pick


def untouched(update: Update) -> Update:
    return update


def spoiled(update: Update) -> Update:
    return edited(update, update.arrays.map(lambda _, array: np.full_like(array, np.nan)))
