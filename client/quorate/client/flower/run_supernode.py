"""Flower's SuperNode, which also notes whether it reaches the server: Flower itself says so in its log alone.

It answers each message once (`one_answer`), and ends where Flower would stay without doing anything.
Run as a program in place of `flower-supernode`, with its arguments.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from quorate.client.node.connection_state import Contact
from quorate.client.node.names import CONTACT, QUIET

log = logging.getLogger(__name__)

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


def main() -> NoReturn:
    """Run the SuperNode until it ends."""
    os.environ.update(QUIET)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    server = sys.argv[sys.argv.index("--superlink") + 1]
    watch(server, Contact(Path(os.environ[CONTACT])))
    from quorate.client.flower.flower_internals import supernode
    from quorate.client.flower.one_answer import OneAnswer

    logging.getLogger("flwr").propagate = False  # it has a handler of its own
    loop, program = supernode()
    OneAnswer().install(loop)
    program()
    # The server gave an answer that Flower's loop does not outlive. Its other threads would, and the process
    # would be there and do nothing; the supervisor starts it again.
    log.error("the SuperNode's loop has ended")
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
