"""All private names of Flower's that the server and a simulation rest on; import-linter keeps others out.

`tests/contract/` fails loudly when one moves.
"""

from __future__ import annotations

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.run import Run as FlowerRun
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["FlowerRun", "ObjectPushError", "RunNotRunningException", "become_task", "set_message_id"]


def become_task(run: int, node: int) -> FlowerRun:
    """Let this process make messages as a task of this run at this node; returns Flower's view of the run.

    Flower's messages read both from the process, so there is one run in it.
    """
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run, node
    return FlowerRun.create_empty(run)


def set_message_id(message: Message, name: str) -> None:
    """Give a message the id that a SuperLink would."""
    message.metadata.__dict__["_message_id"] = name
