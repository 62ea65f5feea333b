"""All private names of Flower's that a site rests on; import-linter keeps them out of its other modules.

What takes long to load is imported when it is asked for: each of Flower's programs needs a part of it.
`tests/contract/` fails loudly when a name moves.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import ErrorCode, Status, SubStatus
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

if TYPE_CHECKING:
    import httpx
    from cryptography.hazmat.primitives.asymmetric import ec

CRASHED, FINISHED, FAILED = ErrorCode.CLIENT_APP_CRASHED, Status.FINISHED, SubStatus.FAILED
"""Code of an error in place of an answer; a task's state, and how it ended."""
CLIENT_APP = TaskType.CLIENT_APP
LOOP = "flwr.supernode.start_client_internal"
"""Module with the SuperNode's loop, which is its function start_client_internal."""
PULL, PUSH, INSERT = "_pull_and_store_message", "_push_messages", "_insert_message"
"""Functions in `LOOP`: take a message, send its answer, put an answer where `PUSH` finds it."""
EXECUTOR = "flwr.supercore.superexec.executor.subprocess_executor"
"""Module that starts a process for a task; see `quorate.shared.process.task_token`."""
_RUNTIME, _COMMAND = "flwr.supernode.runtime.run_clientapp", "flwr.supernode.cli.flwr_clientapp"


def clientapp() -> tuple[ModuleType, Callable[[], None]]:
    """Return the module whose function run_clientapp answers a message, and the program that calls it."""
    return importlib.import_module(_RUNTIME), importlib.import_module(_COMMAND).flwr_clientapp


def supernode() -> tuple[ModuleType, Callable[[], None]]:
    """Return the module `LOOP`, and the program that calls it."""
    from flwr.supernode.cli import flower_supernode

    return importlib.import_module(LOOP), flower_supernode


def superexec() -> tuple[ModuleType, Callable[[], None]]:
    """Return the module `EXECUTOR`, and the program that starts others with it."""
    from flwr.supercore.cli import flower_superexec

    return importlib.import_module(EXECUTOR), flower_superexec


def build_bundle(folder: Path) -> bytes:
    """Return the ZIP archive that Flower makes of an app's folder, which it calls a FAB."""
    return build_fab_from_disk(folder)


def is_whole(store: Any, message_id: str) -> bool:
    """Return whether all objects of a message are there: a program hands them over one by one."""
    from flwr.supercore.object_store.object_store import NoObjectInStoreError

    try:
        tree = store.get_object_tree(message_id)
    except NoObjectInStoreError:
        return False
    return all(store.get(each.object_id) for each in iterate_object_tree(tree))


def activate_without_heartbeat(
    server: str, key: ec.EllipticCurvePrivateKey, client: httpx.Client
) -> httpx.Response | None:
    """Ask the Fleet API for an activation that cannot be; returns the refusal, None where it was none.

    Args:
        server: HOST:PORT.
        key: the node key that signs.
    Raises: httpx.TransportError.
    """
    import httpx
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    public = key.public_key()
    signs: list[Any] = [RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(key, public)]
    fleet = FleetHttpClient(f"https://{server}", interceptors=signs)
    fleet.close()  # its own client would know neither our certificate nor when no proxy is to be used
    fleet._client = client
    try:
        fleet.ActivateNode(ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=0))
    except httpx.HTTPStatusError as error:
        return error.response
    return None
