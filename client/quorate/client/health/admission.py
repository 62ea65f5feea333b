"""Whether the server has admitted this site's node key, asked in a way that changes nothing there.

Flower tells that when a node is activated alone. It looks the key up first, then at the heartbeat that the
node promises: one of 0 seconds is refused, and so nothing is activated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    Raises: ConfigError: the node key is none. httpx.TransportError.
    """
    from quorate.client.flower.flower_internals import activate_without_heartbeat

    private = load_ssh_private_key(site.node_key.read_bytes(), None)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            f"{site.node_key}: must be an ECDSA key; make one with `quorate site enrol --renew`."
        )
    refusal = activate_without_heartbeat(site.connection.server, private, client)
    if refusal is None:
        raise ConfigError(
            "this version of flwr activates a node without a heartbeat; install the one asked for."
        )
    return refusal


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
