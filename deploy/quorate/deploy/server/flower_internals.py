"""All private names of Flower's that the coordinator's commands rest on; import-linter keeps others out.

`tests/contract/test_control.py` fails loudly when one moves. Flower is imported when it is asked for:
commands load this module for its constants.
"""

from __future__ import annotations

from dataclasses import dataclass

CLI = "flwr.cli.app"
"""What `python -m` runs as the command `flwr`."""
ONLINE, UNREGISTERED = "online", "unregistered"
"""States of a node, in Flower's words."""


@dataclass(frozen=True)
class SuperNode:
    """A node that the SuperLink knows.

    Args:
        id: Flower's.
        public_key: PEM.
        state: registered, online, offline or unregistered.
    """

    id: int
    public_key: bytes
    state: str


class ControlClient:
    """Asks a SuperLink about its nodes. Every call raises httpx.HTTPError where it does not do as asked.

    Args:
        address: HOST:PORT of the SuperLink.
        certificate: PEM, of the authority that it must show.
    """

    def __init__(self, address: str, certificate: bytes) -> None:
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        self._client = ControlHttpClient.from_server_address(
            server_address=address,
            insecure=False,
            root_certificates=certificate,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="quorate")],
        )

    def nodes(self) -> list[SuperNode]:
        """Return the nodes that the SuperLink knows, also those that were unregistered."""
        from flwr.proto.control_pb2 import ListNodesRequest

        listed = self._client.ListNodes(ListNodesRequest()).nodes_info
        return [SuperNode(each.node_id, each.public_key, each.status) for each in listed]

    def register(self, public_key: bytes, name: str) -> int:
        """Register a key (PEM) under a name; returns the node's id."""
        from flwr.proto.control_pb2 import RegisterNodeRequest

        return self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name)).node_id

    def unregister(self, node: int) -> None:
        """Withdraw a node's key, for ever."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        self._client.UnregisterNode(UnregisterNodeRequest(node_id=node))

    def close(self) -> None:
        self._client.close()
