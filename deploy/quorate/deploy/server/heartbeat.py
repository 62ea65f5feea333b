"""A sign of life while Flower's modules load.

The SuperLink gives a process that it has work for 30 seconds for its first heartbeat, and else hands the work
to another one, which is then as late, and so on for ever. On a machine that is busy enough loading takes that
long. This needs the standard library alone, so that the first heartbeat goes out at once.
"""

from __future__ import annotations

import argparse
import http.client
import logging
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from importlib.metadata import version

log = logging.getLogger(__name__)

PATH, TOKEN_HEADER = "/v1/runtime/send-task-heartbeat", "flwr-task-token"
_EVERY_SECONDS = 10.0
_TIMEOUT = 20.0


@contextmanager
def beating(arguments: Sequence[str]) -> Iterator[None]:
    """Send heartbeats in the background.

    Args:
        arguments: of Flower's `flwr-serverapp`, which say where to and with which token.
    """
    parser = argparse.ArgumentParser(add_help=False)
    for name in ("--runtime-api-address", "--token", "--root-certificates"):
        parser.add_argument(name)
    known, _ = parser.parse_known_args(arguments)
    if not (known.runtime_api_address and known.token and known.root_certificates):
        yield
        return
    done = threading.Event()
    context = ssl.create_default_context(cafile=known.root_certificates)

    def beat() -> None:
        while not done.is_set():
            try:
                beat_once(known.runtime_api_address, known.token, context)
            except (
                OSError,
                http.client.HTTPException,
            ) as error:  # Flower tries again, and says what is wrong
                log.debug("no heartbeat: %s", error)
            done.wait(_EVERY_SECONDS)

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def beat_once(address: str, token: str, context: ssl.SSLContext) -> int:
    """Send one heartbeat: a message without fields, hence without bytes. Returns the HTTP status."""
    headers = {
        "content-type": "application/protobuf",
        "accept": "application/protobuf",
        "flwr-package-name": "flwr",
        "flwr-package-version": version("flwr"),
        "flwr-component-name": "flwr-serverapp",
        TOKEN_HEADER: token,
    }
    with closing(http.client.HTTPSConnection(address, context=context, timeout=_TIMEOUT)) as connection:
        connection.request("POST", PATH, b"", headers)
        return connection.getresponse().status
