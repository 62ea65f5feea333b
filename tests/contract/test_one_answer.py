"""One answer to each message, against the loop and the state of Flower's own SuperNode.

The server's end of the connection is a handful of functions, as Flower gives them to its loop.
"""

from __future__ import annotations

import importlib
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import Status, SubStatus
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.nodestate import NodeStateFactory

from quorate.client.flower.flower_internals import LOOP
from quorate.client.flower.one_answer import LOST, REPLACED, OneAnswer
from quorate.client.node.names import CONTACT
from quorate.shared.errors import QuorateError

RUN = 7


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    """Messages cannot be made by a process that is no task of Flower's."""
    names = ("task_id", "run_id", "node_id")
    before = {name: vars(TaskIdentity).get(name) for name in names}
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, 1
    yield
    for name in names:
        setattr(TaskIdentity, name, before[name])


class SuperNode:
    """Flower's SuperNode between its server and its programs.

    Args:
        loop: Flower's module, or a copy that is mended.
    """

    def __init__(self, loop: Any) -> None:
        self.loop = loop
        factory = NodeStateFactory(ObjectStoreFactory())
        self.state = factory.state()
        self.store = factory.objectstore_factory.store()
        self.state.set_node_id(1)
        self.state.store_run(Run.create_empty(RUN))
        self.sent: list[Message] = []

    def take(self, message: Message, confirm: Callable[..., None], pull: Any = None) -> int | None:
        """Take one message, of which the server hands over the objects with `pull`."""
        contents = {key: each.deflate() for key, each in get_all_nested_objects(message).items()}
        with no_object_id_recompute():
            received = (remove_content_from_message(message), get_object_tree(message))
        taken: int | None = self.loop._pull_and_store_message(
            state=self.state,
            object_store=self.store,
            node_config={},
            receive=lambda: received,
            get_run=None,
            get_fab=None,
            pull_object=pull or (lambda _, key: contents[key]),
            confirm_message_received=confirm,
            trusted_entities=None,
        )
        return taken

    def send(self) -> None:
        """Send the answer, once there is one."""

        def send(message: Message, tree: Any, _: float) -> tuple[set[str], str]:
            self.sent.append(message)
            return set(), ""

        self.loop._push_messages(
            state=self.state, object_store=self.store, send=send, push_object=lambda *_: None
        )

    def claim(self) -> tuple[int, str]:
        """Take the one task that waits, as a program does."""
        (task,) = self.state.get_tasks(statuses=[Status.PENDING])
        token = self.state.claim_task(task.task_id)
        assert token and self.state.activate_task(task.task_id)
        self.state.get_messages_legacy(run_ids=[RUN], is_reply=False, limit=1)
        return task.task_id, token

    def answer(self, message: Message, objects: int | None = None) -> None:
        """Hand over an answer, or as many of its objects."""
        reply = Message(content("answer"), reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        session = self.state.start_session(RUN)
        with no_object_id_recompute():
            stored, missing = self.state.store_message_and_object_tree(
                remove_content_from_message(reply), get_object_tree(reply), session
            )
            assert stored
            for key in missing[:objects]:
                given = get_all_nested_objects(reply)[key].deflate()
                assert self.state.store_object(RUN, session, key, given)

    def answered(self) -> list[tuple[str, str | None]]:
        """Of what was sent: the message that it answers, and the reason of an error."""
        return [
            (each.metadata.reply_to_message_id, each.error.reason if each.has_error() else None)
            for each in self.sent
        ]


def content(word: str) -> RecordDict:
    array = Array(dtype="uint8", shape=(len(word),), stype="safetensors", data=word.encode())
    return RecordDict({"record": ArrayRecord({"array": array})})


def message(word: str) -> Message:
    made = Message(content(word), dst_node_id=1, message_type="query")
    made.metadata.__dict__["_message_id"] = made.object_id
    return made


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> SuperNode:
    return SuperNode(importlib.import_module(LOOP))


@pytest.fixture
def supernode(monkeypatch: pytest.MonkeyPatch) -> SuperNode:
    loop = importlib.import_module(LOOP)
    for name in REPLACED:
        monkeypatch.setattr(loop, name, getattr(loop, name))  # given back after the test
    OneAnswer().install(loop)
    return SuperNode(loop)


def confirmed(*_: object) -> None: ...


def run_is_over(supernode: SuperNode, lost: Message) -> Callable[..., None]:
    """A receipt that the server takes for none, as the run has ended; a program has answered before."""

    def confirm(*_: object) -> None:
        supernode.claim()
        supernode.answer(lost)
        raise RunNotRunningException

    return confirm


def test_flower_itself_sends_the_answer_to_a_lost_message_in_place_of_the_next(plain: SuperNode) -> None:
    """Where this fails, Flower has mended it, and `one_answer` can be shorter."""
    lost, following = message("lost"), message("following")
    assert plain.take(lost, run_is_over(plain, lost)) is None
    assert plain.take(following, confirmed) == RUN
    plain.send()
    assert plain.answered() == [(lost.metadata.message_id, None)]


def test_a_site_does_not_fall_an_answer_behind(supernode: SuperNode) -> None:
    lost, following = message("lost"), message("following")
    assert supernode.take(lost, run_is_over(supernode, lost)) == RUN
    supernode.send()
    assert supernode.take(following, confirmed) == RUN
    supernode.claim()
    supernode.answer(following)
    supernode.send()
    assert supernode.answered() == [(lost.metadata.message_id, LOST), (following.metadata.message_id, None)]


def test_an_answer_that_comes_too_late_is_not_sent(supernode: SuperNode) -> None:
    lost, following = message("lost"), message("following")

    def confirm(*_: object) -> None:
        claimed.append(supernode.claim())
        raise RunNotRunningException

    claimed: list[tuple[int, str]] = []
    supernode.take(lost, confirm)
    supernode.send()
    ((_, token),) = claimed
    assert supernode.state.get_task_by_token(token) is None  # so the program is refused from now on
    supernode.take(following, confirmed)
    supernode.answer(lost)  # it was let in a moment before
    supernode.claim()
    supernode.answer(following)
    supernode.send()
    assert supernode.answered()[1:] == [(following.metadata.message_id, None)]


def test_a_message_that_does_not_come_whole_is_answered_with_an_error(supernode: SuperNode) -> None:
    def broken(*_: object) -> bytes:
        raise RuntimeError("HTTP 500")

    lost = message("lost")
    assert supernode.take(lost, confirmed, broken) == RUN
    supernode.send()
    assert supernode.answered() == [(lost.metadata.message_id, LOST)]
    assert not supernode.state.get_tasks(statuses=[Status.PENDING, Status.STARTING, Status.RUNNING])


@pytest.mark.parametrize("objects", [None, 0, 1])
def test_a_program_that_ends_without_an_answer_or_in_the_middle_of_it(
    supernode: SuperNode, objects: int | None
) -> None:
    asked = message("asked")
    supernode.take(asked, confirmed)
    task, _ = supernode.claim()
    if objects is not None:
        supernode.answer(asked, objects)
    sending = threading.Thread(target=supernode.send, daemon=True)
    sending.start()
    sending.join(1.5)
    assert sending.is_alive() and not supernode.sent  # it may still come
    supernode.state.finish_task(task, SubStatus.FAILED, "killed")
    sending.join(30)
    assert supernode.answered() == [(asked.metadata.message_id, LOST)]
    assert not supernode.store and not supernode.state.msg_store  # type: ignore[attr-defined]


def test_whatever_goes_wrong_with_one_message_the_next_has_its_own_answer(supernode: SuperNode) -> None:
    chance = random.Random(15)
    for number in range(300):
        lost, following = message(f"lost {number}"), message(f"following {number}")
        failure = chance.choice([None, RunNotRunningException(), RuntimeError("HTTP 500")])
        where = chance.choice(["pull", "confirm"])
        program = chance.choice(["none", "claims", "answers in part", "answers", "ends"])

        def works(failure: Any = failure, program: str = program, lost: Message = lost) -> None:
            if program != "none":
                task, _ = supernode.claim()
                if program.startswith("answers"):
                    supernode.answer(lost, 1 if program == "answers in part" else None)
                if program == "ends" or failure is None:
                    supernode.state.finish_task(task, SubStatus.FAILED, "killed")
            elif failure is None:
                supernode.claim()
                supernode.answer(lost)
            if failure is not None:
                raise failure

        def pulls(_: int, key: str, lost: Message = lost, works: Any = works) -> bytes:
            works()
            return get_all_nested_objects(lost)[key].deflate()

        fails_at_pull = where == "pull" and failure is not None
        supernode.take(
            lost, confirmed if fails_at_pull else lambda *_: works(), pulls if fails_at_pull else None
        )
        supernode.send()
        if chance.random() < 0.5:
            supernode.answer(lost)  # one that was let in a moment before its token was worth nothing
        assert supernode.take(following, confirmed) == RUN
        if chance.random() < 0.5:
            supernode.answer(lost)
        supernode.claim()
        supernode.answer(following)
        supernode.send()
        asked = [each.metadata.reply_to_message_id for each in supernode.sent]
        assert asked == [lost.metadata.message_id, following.metadata.message_id], (number, where, program)
        assert not supernode.sent[1].has_error()
        assert supernode.sent[0].has_error() == (failure is not None or program not in ("none", "answers"))
        supernode.sent.clear()


def test_a_run_of_a_kind_that_is_refused_does_not_keep_the_site_waiting(supernode: SuperNode) -> None:
    agent = replace(Run.create_empty(RUN), primary_task_type=TaskType.AGENT_APP)
    supernode.state.store_run(agent)
    asked = message("asked")
    assert supernode.take(asked, confirmed) == RUN
    supernode.send()
    assert supernode.answered() == [(asked.metadata.message_id, LOST)]
    assert not supernode.state.get_tasks()


def test_nothing_is_taken_where_there_is_nothing(supernode: SuperNode) -> None:
    named = dict.fromkeys(("node_config", "get_run", "get_fab", "pull_object", "confirm_message_received"))
    taken = supernode.loop._pull_and_store_message(
        state=supernode.state,
        object_store=supernode.store,
        receive=lambda: None,
        trusted_entities=None,
        **named,
    )
    assert taken is None and not supernode.sent


@pytest.mark.parametrize("name", REPLACED)
@pytest.mark.parametrize("how", ["not called", "gone", "other arguments"])
def test_a_flower_that_works_in_another_way_is_not_run(name: str, how: str) -> None:
    loop = importlib.import_module(LOOP)
    names = [each for each in REPLACED if each != name or how != "not called"]
    functions = {each: getattr(loop, each) for each in REPLACED if each != name or how != "gone"}
    if how == "other arguments":
        functions[name] = lambda connection: None
    code = SimpleNamespace(__code__=SimpleNamespace(co_names=names))
    with pytest.raises(QuorateError) as caught:
        OneAnswer().install(SimpleNamespace(start_client_internal=code, **functions))  # type: ignore[arg-type]
    assert f" {name} " in str(caught.value)


ENDED = """
import sys, threading, time
import flwr.supernode.cli as cli
cli.flower_supernode = lambda: threading.Thread(target=time.sleep, args=(120,)).start()
sys.argv[1:] = ["--superlink", "localhost:1"]
from quorate.client.flower.run_supernode import main
main()
"""


def test_a_supernode_whose_loop_has_ended_is_not_there_any_more(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDED],
        env={CONTACT: str(tmp_path / "contact.json"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1 and "loop has ended" in done.stderr
