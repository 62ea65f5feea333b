"""What the server takes for granted of Flower: private names, and the calls that SuperNodes make."""

from __future__ import annotations

import importlib
import inspect
import re
from importlib.metadata import distribution
from pathlib import Path

import pytest

from quorate.deploy.server.flower_internals import ONLINE, UNREGISTERED
from quorate.deploy.server.nginx import CALLS
from quorate.shared.process import heartbeat


def test_supernodes_call_what_nginx_lets_through_and_nothing_else() -> None:
    client = importlib.import_module("flwr.supernode.fleet_http_client")
    called = set(re.findall(r'path="/v1/fleet/([\w-]+)"', inspect.getsource(client.FleetHttpClient)))
    # A SuperNode registers itself where it has no key of its own, which the coordinator does not want.
    assert called - {"register-node", "unregister-node"} == set(CALLS)


def test_the_header_that_nginx_compares_is_the_one_that_supernodes_send() -> None:
    constants = importlib.import_module("flwr.supercore.constant")
    folder = Path(importlib.import_module("quorate.deploy.server").__path__[0])
    variable = "$http_" + constants.FLEET_HTTP_PUBLIC_KEY_HEADER.replace("-", "_")
    assert f"$pinned_key != {variable})" in (folder / "templates" / "nginx.conf.j2").read_text()


def test_names_of_the_control_side_are_where_they_are_expected() -> None:
    client = importlib.import_module("flwr.supercore.control").ControlHttpClient
    assert {"from_server_address", "ListNodes", "RegisterNode", "UnregisterNode"} <= set(dir(client))
    messages = importlib.import_module("flwr.proto.control_pb2")
    messages.RegisterNodeRequest(public_key=b"key", name="site")
    messages.UnregisterNodeRequest(node_id=1)
    node = importlib.import_module("flwr.proto.node_pb2").NodeInfo()
    assert {"node_id", "public_key", "status", "name"} <= set(node.DESCRIPTOR.fields_by_name)
    states = importlib.import_module("flwr.supercore.constant").NodeStatus
    assert (states.ONLINE, states.UNREGISTERED) == (ONLINE, UNREGISTERED)


@pytest.mark.parametrize("name", ["flower-superlink", "flower-superexec", "flwr-serverapp"])
def test_flower_has_the_programs(name: str) -> None:
    (entry,) = distribution("flwr").entry_points.select(group="console_scripts", name=name)
    assert callable(entry.load())


def test_the_superlinks_flags_are_there() -> None:
    module = importlib.import_module("flwr.superlink.cli.flower_superlink")
    options = module._parse_args_run_superlink()._option_string_actions
    assert {
        "--isolation",
        "--superexec-auth-secret-file",
        "--enable-supernode-auth",
        "--database",
        "--disable-runtime-dependency-installation",
        "--health-server-address",
    } <= set(options)


def test_the_early_heartbeat_speaks_as_flowers_own() -> None:
    constants = importlib.import_module("flwr.supercore.constant")
    assert constants.TASK_TOKEN_HEADER == heartbeat.TOKEN_HEADER
    client = importlib.import_module("flwr.supercore.runtime").RuntimeHttpClient
    assert f'path="{heartbeat.PATH}"' in inspect.getsource(client.SendTaskHeartbeat)
    message = importlib.import_module("flwr.proto.runtime_pb2").SendTaskHeartbeatRequest()
    assert message.SerializeToString() == b"" and not message.DESCRIPTOR.fields
