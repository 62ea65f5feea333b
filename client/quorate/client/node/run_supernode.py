"""Flower's SuperNode, which also notes whether it reaches the server: Flower itself says so in its log alone.

Run as a program in place of `flower-supernode`, with its arguments.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quorate.client.node.contact import Contact
from quorate.client.node.names import CONTACT, QUIET

_GATEWAY = (502, 503, 504)


def watch(server: str, contact: Contact) -> None:
    """Note the outcome of every request that this process sends to `server` (HOST:PORT)."""
    import httpx

    send: Callable[..., httpx.Response] = httpx.Client.send

    def noted(client: httpx.Client, request: httpx.Request, **options: Any) -> httpx.Response:
        if request.url.netloc.decode("ascii").casefold() != server.casefold():
            return send(client, request, **options)
        try:
            response = send(client, request, **options)
        except httpx.TransportError as error:
            contact.note("unreachable", type(error).__name__, time.time())
            raise
        status = response.status_code
        if response.is_success:
            contact.note("connected", "", time.time())
        else:  # a gateway on the way that does not get through is no refusal
            contact.note("unreachable" if status in _GATEWAY else "refused", f"HTTP {status}", time.time())
        return response

    httpx.Client.send = noted  # type: ignore[method-assign, assignment]


def main() -> None:
    """Run the SuperNode until it ends."""
    os.environ.update(QUIET)
    server = sys.argv[sys.argv.index("--superlink") + 1]
    watch(server, Contact(Path(os.environ[CONTACT])))
    from flwr.supernode.cli import flower_supernode

    flower_supernode()


if __name__ == "__main__":
    main()
