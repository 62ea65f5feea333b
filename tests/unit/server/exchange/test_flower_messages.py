"""Messages that a SuperLink took in part: brought again until it has them all, or given up with one error."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from flwr.proto.runtime_pb2 import PushAppMessagesRequest, PushAppMessagesResponse
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid.http_grid import HttpGrid

from quorate.server.exchange import flower_messages
from quorate.shared.errors import OutputError

RUN, NODE = 7, 1001
SEEN_TWICE = 2
"""The object whose storing is told to nobody."""


@pytest.fixture(autouse=True)
def process_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_task_id": 1, "_run_id": RUN, "_node_id": 1}.items():
        monkeypatch.setattr(TaskIdentity, name, value)


class SuperLink:
    """Flower's own state and object store behind the calls of its Runtime API.

    Args:
        refuses: a full disk: no object is stored.
    """

    def __init__(self, *, refuses: bool = False) -> None:
        self.objects = InMemoryObjectStore()
        self.state = InMemoryLinkState(NoOpFederationManager(), self.objects)
        self.refuses = refuses
        self.calls = self.pushes = 0
        self.stored: list[str] = []

    def PushMessages(self, request: PushAppMessagesRequest) -> PushAppMessagesResponse:
        self.pushes += 1
        session = self.state.start_session(RUN)
        missing = [
            each
            for tree in request.message_object_trees
            for each in self.state.preregister_object_tree(tree, session)
        ]
        ids = [each.metadata.message_id for each in request.messages_list]
        return PushAppMessagesResponse(
            message_ids=ids, objects_to_push=dict.fromkeys(missing), session_id=session
        )

    def PushObject(self, request: PushObjectRequest) -> PushObjectResponse:
        if self.refuses:
            return PushObjectResponse(stored=False)
        self.calls += 1
        if self.calls == SEEN_TWICE:  # killed before it could answer: Flower brings the object again
            assert self._store(request)
        return PushObjectResponse(stored=self._store(request))

    def _store(self, request: PushObjectRequest) -> bool:
        stored = self.state.store_object(RUN, request.session_id, request.object_id, request.object_content)
        self.stored += [request.object_id] * stored
        return stored


class Description:
    """What the grid asks of Flower's description of a run."""

    run_id = RUN


def grid_on(superlink: SuperLink, monkeypatch: pytest.MonkeyPatch) -> HttpGrid:
    grid = HttpGrid(insecure=True, token="token")
    monkeypatch.setattr(grid, "_client", superlink)
    monkeypatch.setattr(grid, "_run", Description())
    monkeypatch.setattr(flower_messages.time, "sleep", lambda _seconds: None)
    return grid


def messages(count: int) -> list[Message]:
    def content(value: int) -> RecordDict:
        data = bytes([value]) * 100
        return RecordDict({"r": ArrayRecord({"a": Array("uint8", (100,), "safetensors", data)})})

    return [Message(content(each), NODE + each, "train", ttl=60.0, group_id="1") for each in range(count)]


def objects_of(pushed: Iterable[Message]) -> set[str]:
    return {each for message in pushed for each in get_all_nested_objects(message)}


def test_an_object_that_was_stored_and_not_acknowledged_is_no_end_of_the_run(
    monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    superlink, sent = SuperLink(), messages(3)
    ids = list(flower_messages.push(grid_on(superlink, monkeypatch), sent))
    assert ids == [message.metadata.message_id for message in sent] and len(set(ids)) == len(sent)
    assert superlink.pushes == 2 and "sending them again" in caplog.text
    for each in objects_of(sent):
        assert superlink.objects.get(each), "an object is missing"
    assert len(superlink.stored) == len(set(superlink.stored)), "what is there is not brought again"


def test_a_superlink_that_stores_nothing_ends_in_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    superlink = SuperLink(refuses=True)
    with pytest.raises(OutputError) as caught:
        flower_messages.push(grid_on(superlink, monkeypatch), messages(1))
    assert str(flower_messages.PUSHES) in str(caught.value) and "--resume" in str(caught.value)
    assert superlink.pushes == flower_messages.PUSHES
