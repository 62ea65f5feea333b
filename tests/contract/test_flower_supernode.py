"""Names of Flower's that a site's guard rests on. Where one moves, bundles would no longer be guarded."""

import importlib
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType

from quorate.client.flower.allowed_commands import GUARDED, REFUSING
from quorate.client.flower.bundle_guard import REFUSED, REPLACED, Guard
from quorate.client.health.server_reachability import ADMITTED, NOT_ADMITTED
from quorate.shared.errors import QuorateError


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    for name in REPLACED:
        monkeypatch.setattr(module, name, getattr(module, name))  # given back after the test
    return module


def test_every_command_that_flower_starts_is_ours() -> None:
    assert set(TASK_TYPE_TO_COMMAND.values()) == {GUARDED, *REFUSING}
    assert TASK_TYPE_TO_COMMAND[TaskType.CLIENT_APP] == GUARDED


def test_flower_calls_what_is_replaced_by_name(runtime: Any) -> None:
    assert set(REPLACED) <= set(runtime.run_clientapp.__code__.co_names)
    assert list(inspect.signature(runtime.pull_task_input).parameters) == ["client"]
    source = inspect.getsource(runtime.run_clientapp)
    assert "message, context, run, fab = pull_task_input(client)" in source
    # Nothing of a bundle is touched but by these four.
    assert "import_module" not in source and "load_app" not in source
    command = importlib.import_module("flwr.supernode.cli.flwr_clientapp")
    assert command.run_clientapp is runtime.run_clientapp


@pytest.mark.parametrize("name", REPLACED)
def test_a_flower_without_one_of_the_names_is_not_run(name: str) -> None:
    def run_clientapp() -> None: ...

    names = [each for each in REPLACED if each != name]
    changed = SimpleNamespace(
        run_clientapp=SimpleNamespace(__code__=SimpleNamespace(co_names=names)), **dict.fromkeys(REPLACED)
    )
    with pytest.raises(QuorateError) as caught:
        Guard().install(changed)  # type: ignore[arg-type]
    assert f" {name}," in str(caught.value)


def test_nothing_of_a_bundle_is_installed_and_an_unjudged_message_is_refused(runtime: Any) -> None:
    guard = Guard()
    guard.install(runtime)
    assert runtime.install_from_fab(b"anything", skip_prompt=True) is None
    load = runtime.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
    assert load("quorate/quorate", "1.0.0", "hash") is not None
    assert refusal(load("quorate/quorate", "1.0.0", "hash")) == (REFUSED, "bundle")


def test_a_foreign_bundle_is_answered_with_our_code(runtime: Any) -> None:
    guard = Guard()
    run = SimpleNamespace(run_id=1, override_config={"run": "0123456789abcdef"})
    guard.admit(None, None, run, SimpleNamespace(content=b"not a bundle"))  # type: ignore[arg-type]
    assert refusal(guard.client_app()) == (REFUSED, "bundle")


def test_flower_tells_an_unknown_key_from_a_wrong_heartbeat() -> None:
    """What `site check` rests on: the key is looked up first, and nothing is activated without heartbeat."""
    from flwr.supercore.error import ApiErrorCode
    from flwr.superlink.servicer.fleet import fleet_handlers

    assert ADMITTED == ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL
    assert NOT_ADMITTED == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED
    source = inspect.getsource(fleet_handlers.activate_node)
    steps = ["get_node_id_by_public_key", "_validate_heartbeat_interval", "state.activate_node("]
    places = [source.index(step) for step in steps]
    assert places == sorted(places)


def refusal(app: Any) -> tuple[int, str]:
    """What the refusing ClientApp answers."""
    from flwr.supercore.task_identity import TaskIdentity

    before = dict(vars(TaskIdentity))
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    try:
        message = Message(RecordDict(), dst_node_id=1, message_type="query")
        reply = app(message, Context(1, 1, {}, RecordDict(), {}))
    finally:
        for name in ("task_id", "run_id", "node_id"):
            setattr(TaskIdentity, name, before.get(name))
    assert isinstance(reply.error, Error)
    return reply.error.code, reply.error.reason
