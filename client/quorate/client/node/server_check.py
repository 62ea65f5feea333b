"""Whether the server can be reached as the SuperNode will: same proxy, same authority, same certificate."""

from __future__ import annotations

import email.utils
import ssl
import time
from urllib.request import getproxies, proxy_bypass

import httpx

from quorate.client.node.folder import SiteFolder
from quorate.shared.errors import ConfigError

_SECONDS = 15.0
_PATH = "/v1/fleet/pull-messages"
_AHEAD_SECONDS, _BEHIND_SECONDS = 5, 300
"""How far this machine's clock may be off before Flower takes its signatures for stale."""


def check_server(site: SiteFolder) -> str:
    """Shake hands with the server and ask what asks for nothing.

    Raises: ConfigError: it cannot be reached, is not of this federation, or the clocks differ too much.
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
    try:
        with httpx.Client(verify=context, timeout=_SECONDS, trust_env=proxied) as client:
            reply = client.post(f"https://{server}{_PATH}")
    except httpx.ProxyError as error:
        raise ConfigError(f"{server}: the proxy {through} refused ({error}); ask its people.") from error
    except httpx.ConnectError as error:
        raise ConfigError(_unreachable(server, via, error)) from error
    except httpx.TransportError as error:
        raise ConfigError(
            f"{server}: does not answer{via} ({type(error).__name__}); is the server up, and does a firewall "
            "let this machine out to that port?"
        ) from error
    _judge(reply, server)
    return f"{server} answers{via}, its certificate is good{_clocks(reply, server)}"


def _unreachable(server: str, via: str, error: Exception) -> str:
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return (
            f"{server}: shows a certificate that this federation's authority did not issue for that name "
            f"({text[:200]}); somebody may be in between: compare ca.crt with the coordinator's by telephone."
        )
    return (
        f"{server}: cannot be reached{via} ({text[:200]}); is the server up, and does a firewall let this "
        "machine out to that port? Behind a proxy, set HTTPS_PROXY."
    )


def _judge(reply: httpx.Response, server: str) -> None:
    if reply.status_code in (502, 503, 504):
        raise ConfigError(
            f"{server}: answers, but Flower behind it does not (HTTP {reply.status_code}); the coordinator "
            "sees why with `quorate server status`."
        )
    if reply.status_code == 400 and "certificate" in reply.text.casefold():
        raise ConfigError(
            f"{server}: does not take this site's client certificate; send client.csr to the coordinator "
            "again."
        )


def _clocks(reply: httpx.Response, server: str) -> str:
    """Return a remark on this machine's clock. Raises: ConfigError: it is too far off."""
    said = reply.headers.get("date")
    if said is None:
        return ""
    ahead = time.time() - email.utils.parsedate_to_datetime(said).timestamp()
    if ahead > _AHEAD_SECONDS or ahead < -_BEHIND_SECONDS:
        raise ConfigError(
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
