"""One answer to each message, its own: what Flower's SuperNode does not see to when a message is lost.

The SuperNode takes a message, waits for any answer, sends it, and takes the next message. That goes wrong

* where the run ends between a message and its receipt: the message stays, a program answers it later, and
  that answer is sent in place of the next one. From then on the site is one answer behind, for ever;
* where a message cannot be stored, or its program ends without an answer or in the middle of one, or is one
  that does not run here: nobody answers, or the SuperNode waits for ever.

Here, what is left of an earlier message is gone before the next one is taken; only an answer to the message
at hand is sent, when all of it is there; and where none can come any more, the server is told so, and asks
again.

`tests/contract/test_one_answer.py` fails loudly where Flower no longer works like this.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from flwr.app import Error, Message

from quorate.client.flower.flower_internals import (
    CLIENT_APP,
    CRASHED,
    FAILED,
    FINISHED,
    INSERT,
    PULL,
    PUSH,
    is_whole,
)
from quorate.shared.errors import QuorateError

log = logging.getLogger(__name__)

REPLACED = {PULL: {"state", "object_store", "receive"}, PUSH: {"state", "object_store"}}
"""Names in the module of the loop that the loop must call by name, and arguments they must have."""
LOST = "unreachable"
"""Reason of the error that stands for a lost answer; the server asks again."""


class OneAnswer:
    """The message that a SuperNode has at hand."""

    def __init__(self) -> None:
        self._message: Message | None = None
        self._task: int | None = None
        self._replies: list[Message] = []

    def install(self, loop: ModuleType) -> None:
        """Replace Flower's names.

        Args:
            loop: Flower's module with the SuperNode's loop.
        Raises: QuorateError: this version of Flower works in another way.
        """
        called = set(loop.start_client_internal.__code__.co_names)
        for name, arguments in REPLACED.items():
            function = getattr(loop, name, None)
            takes = set(inspect.signature(function).parameters) if function is not None else set()
            if name not in called or not arguments <= takes:
                raise QuorateError(
                    f"this version of flwr no longer calls {name} as before, so a site could fall one answer "
                    "behind; install the version that quorate asks for."
                )
        pull, push, self._insert = (getattr(loop, name) for name in (PULL, PUSH, INSERT))
        loop.__dict__[PULL] = lambda **given: self.pull(pull, **given)
        loop.__dict__[PUSH] = lambda **given: self.push(push, **given)

    def pull(
        self, pull: Callable[..., int | None], *, state: Any, object_store: Any, receive: Any, **others: Any
    ) -> int | None:
        """Take a message, if there is one; returns its run's id, or None. A lost one is answered too."""
        self._forget(state, object_store)

        def noted() -> Any:
            if (received := receive()) is not None:
                self._message = received[0]
            return received

        run_id = pull(state=_Noting(state, self), object_store=object_store, receive=noted, **others)
        if run_id is not None or self._message is None:
            return run_id
        lost = self._message
        log.warning("message %s was lost before it was here; saying so", lost.metadata.message_id)
        self._forget(state, object_store)
        self._message = lost
        return int(lost.metadata.run_id)

    def push(self, push: Callable[..., None], *, state: Any, object_store: Any, **others: Any) -> None:
        push(state=_Answering(state, object_store, self), object_store=object_store, **others)

    def created(self, task: int | None) -> int | None:
        self._task = task
        return task

    def answers(self, state: Any, store: Any) -> list[Message]:
        """Return the answer to the message at hand; none while it may still come."""
        assert self._message is not None  # Flower pushes after it has pulled
        asked = self._message.metadata.message_id
        # Before the look: what is not there then never comes.
        over = self._over(state)
        self._replies += [
            reply
            for reply in state.get_messages_legacy(is_reply=True)
            if reply.metadata.reply_to_message_id == asked
        ]
        if whole := [reply for reply in self._replies if is_whole(store, reply.metadata.message_id)]:
            return whole[:1]
        if not over:
            return []
        log.warning("no answer to message %s can come any more; saying so", asked)
        message = self._message
        self._forget(state, store)
        self._message = message
        state.store_message(message)  # Flower looks up how long it took, and forgets it when it has sent
        state.record_message_processing_start(asked)
        state.record_message_processing_end(asked)
        lost = Message(Error(CRASHED, LOST), reply_to=message)
        self._insert(lost, state, store)
        return [lost]

    def _over(self, state: Any) -> bool:
        """Return whether no program works on the message at hand, nor will."""
        if self._task is None:
            return True
        tasks = state.get_tasks(task_ids=[self._task])
        return not tasks or tasks[0].status.status == FINISHED

    def _forget(self, state: Any, store: Any) -> None:
        """Drop all that is left of the message at hand, and keep its program from answering."""
        if self._task is not None:
            state.finish_task(self._task, FAILED, LOST)  # its token is worth nothing from now on
        state.delete_messages()
        store.clear()
        self._message = self._task = None
        self._replies = []


class _Noting:
    """Flower's state, which also notes the task that is made for a message."""

    def __init__(self, state: Any, noted: OneAnswer) -> None:
        self._state, self._noted = state, noted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def create_task(self, *, task_type: str, **named: Any) -> int | None:
        # The commands of every other type refuse to start (`guard`): one that waits for them waits for ever.
        if task_type != CLIENT_APP:
            log.error("refused a message of type %s: a site answers ClientApp messages alone", task_type)
            return None
        return self._noted.created(self._state.create_task(task_type=task_type, **named))


class _Answering:
    """Flower's state, in which the answer to the message at hand alone is found."""

    def __init__(self, state: Any, store: Any, noted: OneAnswer) -> None:
        self._state, self._store, self._noted = state, store, noted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def get_messages_legacy(self, *, is_reply: bool) -> Sequence[Message]:
        assert is_reply  # the one question of Flower's loop
        return self._noted.answers(self._state, self._store)
