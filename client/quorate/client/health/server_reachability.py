"""Whether the server can be reached as the SuperNode will: same proxy, same authority, same certificate.

And whether it has admitted this site's node key, asked in a way that changes nothing there: Flower tells that
when a node is activated alone. It looks the key up first, then at the heartbeat that is promised: one of 0
seconds is refused, and so nothing is activated.
"""

from __future__ import annotations

import email.utils
import ssl
import time
from dataclasses import dataclass
from urllib.request import getproxies, proxy_bypass

import httpx
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from quorate.client.health.credentials import RENEW_SERVER
from quorate.client.node.folder import SiteFolder
from quorate.shared.errors import ConfigError, NotReady, QuorateError
from quorate.shared.process.looks import Line, check_days, line

SERVER, CERTIFICATE, ADMISSION = "server", "server certificate", "admission"
"""Names of the lines on the server."""
ADMITTED, NOT_ADMITTED = 2003, 2004
"""Flower's codes of an activation that promises a wrong heartbeat, and of one with an unknown key."""
_SECONDS = 15.0
_AHEAD_SECONDS, _BEHIND_SECONDS = 5, 300
"""How far this machine's clock may be off before Flower takes its signatures for stale."""


class Unreached(NotReady):
    """No connection to the server came about."""


@dataclass(frozen=True)
class ServerReply:
    """What came back from the server.

    Args:
        reply: to a request that asks for nothing.
        via: through which proxy, in words; empty: directly.
    """

    reply: httpx.Response
    certificate: x509.Certificate
    via: str


def server_lines(
    site: SiteFolder, *, signed: bool, connected: bool = False, seconds: float = _SECONDS
) -> list[Line]:
    """Look at the way to the server, at the certificate that it shows, and at what it says to the node key.

    Args:
        signed: ask with the node key too, which takes Flower, and so a few seconds.
        connected: whether the SuperNode gets through; where this command does not, it has another proxy or
            other rights, and nothing is wrong with the site.
        seconds: longest wait.
    """
    try:
        answer = _ask(site, signed=signed, seconds=seconds)
    except (QuorateError, OSError) as error:
        if connected and isinstance(error, Unreached):
            found = f"the SuperNode reaches it, this command does not, and so sees no certificate ({error})"
            return [Line(what=SERVER, ok=True, found=found)]
        failure = error  # the name `error` ends with this block

        def failed() -> str:
            raise failure

        return [line(SERVER, failed)]
    lines = [
        line(SERVER, lambda: _reached(site, answer)),
        line(CERTIFICATE, lambda: _days(site, answer.certificate)),
    ]
    if signed and lines[0].ok:
        lines.append(line(ADMISSION, lambda: judge(site, answer.reply)))
    return lines


def _ask(site: SiteFolder, *, signed: bool, seconds: float) -> ServerReply:
    """Shake hands with the server and ask what asks for nothing.

    Raises: NotReady: it cannot be reached, or its certificate has expired. ConfigError: it is not of this
        federation.
    """
    server = site.connection.server
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile=str(site.ca))
    if site.connection.mutual_tls:
        context.load_cert_chain(str(site.client_crt), str(site.client_key))
    # The forwarder of mutual TLS knows no proxy, so then none is tried here either.
    proxied = not site.connection.mutual_tls
    through = _proxy(server) if proxied else None
    via = f" through the proxy {through}" if through else ""
    shown: list[bytes] = []

    def note(response: httpx.Response) -> None:
        shown.append(response.extensions["network_stream"].get_extra_info("ssl_object").getpeercert(True))

    try:
        with httpx.Client(
            verify=context, timeout=seconds, trust_env=proxied, event_hooks={"response": [note]}
        ) as client:
            # `/` is answered 404, and is not worth a line of the server's log.
            reply = knock(site, client) if signed else client.get(f"https://{server}/")
    except httpx.ProxyError as error:
        raise Unreached(f"{server}: the proxy {through} refused ({error}); ask its people.") from error
    except httpx.ConnectError as error:
        raise _unreachable(server, via, error) from error
    except httpx.TransportError as error:
        raise Unreached(
            f"{server}: does not answer{via} ({type(error).__name__}); is the server up, and does a firewall "
            "let this machine out to that port?"
        ) from error
    return ServerReply(reply, x509.load_der_x509_certificate(shown[0]), via)


def _unreachable(server: str, via: str, error: Exception) -> QuorateError:
    text = str(error)
    if "certificate has expired" in text:
        return NotReady(
            f"{server}: its certificate has expired; {RENEW_SERVER}, or set this machine's clock right."
        )
    if "not yet valid" in text:
        return NotReady(f"{server}: its certificate is not valid yet; set this machine's clock right.")
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return ConfigError(
            f"{server}: shows a certificate that this federation's authority did not issue for that name "
            f"({text[:200]}); somebody may be in between: compare ca.crt with the coordinator's by telephone."
        )
    return Unreached(
        f"{server}: cannot be reached{via} ({text[:200]}); is the server up, and does a firewall let this "
        "machine out to that port? Behind a proxy, set HTTPS_PROXY."
    )


def _reached(site: SiteFolder, answer: ServerReply) -> str:
    """Return that the server answers. Raises: NotReady: Flower does not, or the clocks differ too much."""
    server, reply = site.connection.server, answer.reply
    if reply.status_code in (502, 503, 504):
        raise NotReady(
            f"{server}: answers, but Flower behind it does not (HTTP {reply.status_code}); the coordinator "
            "sees why with `quorate server status`."
        )
    if reply.status_code == 400 and "certificate" in reply.text.casefold():
        raise NotReady(
            f"{server}: does not take this site's client certificate; it was revoked, or is not of this "
            "federation: send client.csr to the coordinator again."
        )
    return f"{server} answers{answer.via}, its certificate is good{_clocks(reply, server)}"


def _days(site: SiteFolder, shown: x509.Certificate) -> str:
    what = f"the certificate of {site.connection.server}"
    return check_days(what, shown.not_valid_before_utc, shown.not_valid_after_utc, RENEW_SERVER)


def _clocks(reply: httpx.Response, server: str) -> str:
    """Return a remark on this machine's clock. Raises: NotReady: it is too far off."""
    said = reply.headers.get("date")
    if said is None:
        return ""
    ahead = time.time() - email.utils.parsedate_to_datetime(said).timestamp()
    if ahead > _AHEAD_SECONDS or ahead < -_BEHIND_SECONDS:
        raise NotReady(
            f"{server}: the clocks differ by {abs(ahead):.0f} s, this machine's is "
            f"{'ahead' if ahead > 0 else 'behind'}; set both by NTP, or Flower refuses what this site signs."
        )
    return f", clocks agree to {max(abs(ahead), 1):.0f} s"


def _proxy(server: str) -> str | None:
    """Return the proxy of the environment for `server`, without a password in it."""
    host = server.rpartition(":")[0]
    if proxy_bypass(host):
        return None
    proxies = getproxies()
    found = proxies.get("https") or proxies.get("all")
    return None if found is None else found.rpartition("@")[2].removeprefix("http://")


def knock(site: SiteFolder, client: httpx.Client) -> httpx.Response:
    """Send a signed request for an activation that cannot be.

    Args:
        site: whose node key signs it.
    Raises: ConfigError: the node key is none. httpx.TransportError.
    """
    from quorate.client.flower.flower_internals import activate_without_heartbeat

    private = load_ssh_private_key(site.node_key.read_bytes(), None)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        message = f"{site.node_key}: must be an ECDSA key; make one with `quorate site enrol --renew`."
        raise ConfigError(message)
    refusal = activate_without_heartbeat(site.connection.server, private, client)
    if refusal is None:
        message = "this version of flwr activates a node without a heartbeat; install the one asked for."
        raise ConfigError(message)
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
