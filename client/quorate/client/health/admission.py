"""Whether the server has admitted this site's node key, asked in a way that changes nothing there.

Flower tells that when a node is activated alone. It looks the key up first, then at the heartbeat that the
node promises: one of 0 seconds is refused, and so nothing is activated.

Touches private names of Flower's: its Fleet client and what signs for it.
`tests/contract/test_flower_supernode.py` fails loudly when they move.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from quorate.client.node.folder import SiteFolder
from quorate.shared.errors import ConfigError, NotReady

if TYPE_CHECKING:
    import httpx

ADMITTED, NOT_ADMITTED = 2003, 2004
"""Flower's codes of an activation that promises a wrong heartbeat, and of one with an unknown key."""


def knock(site: SiteFolder, client: httpx.Client) -> httpx.Response:
    """Send a signed request for an activation that cannot be.

    Args:
        site: whose node key signs it.
        client: how the server is reached.
    Raises: ConfigError: the node key is none. httpx.TransportError.
    """
    import httpx
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    private = load_ssh_private_key(site.node_key.read_bytes(), None)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            f"{site.node_key}: must be an ECDSA key; make one with `quorate site enrol --renew`."
        )
    public = private.public_key()
    signs: list[Any] = [RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(private, public)]
    fleet = FleetHttpClient(f"https://{site.connection.server}", interceptors=signs)
    fleet.close()  # its own client would know neither our certificate nor when no proxy is to be used
    fleet._client = client
    try:
        fleet.ActivateNode(ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=0))
    except httpx.HTTPStatusError as error:
        return error.response
    raise ConfigError("this version of flwr activates a node without a heartbeat; install the one asked for.")


def judge(site: SiteFolder, reply: httpx.Response) -> str:
    """Say what the answer to `knock` means. Raises: NotReady: the key is not admitted."""
    try:
        code = int(reply.json()["code"])
    except (ValueError, KeyError, TypeError):  # nginx's own words, or another version of Flower
        code = 0
    if code == ADMITTED:
        return "the node key is admitted"
    name = site.connection.site
    if code == NOT_ADMITTED:
        raise NotReady(
            "the coordinator has not admitted this node key, or has revoked it; send "
            f"{site.path / 'node.pub'} for `quorate server admit {name} node.pub`."
        )
    if reply.status_code == 403:
        raise NotReady(
            f"the server takes the client certificate of this site with another node key alone; have the "
            f"coordinator look at both with `quorate certificates list`, and sign or admit {name} anew."
        )
    raise NotReady(
        f"the server does not say whether this node key is admitted (HTTP {reply.status_code}: "
        f"{reply.text[:200]}); is it of this release of Quorate?"
    )
