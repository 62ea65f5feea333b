"""A sign of life while Flower's modules load.

A SuperLink, or a SuperNode, gives a process that it has work for 30 seconds for its first heartbeat, and else
hands the work to another one, which is then as late, and so on for ever, each in the way of the others. On a
machine that is busy enough loading takes that long. This needs little but the standard library, so that the
first heartbeat goes out at once.
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

from quorate.shared.process import task_token

log = logging.getLogger(__name__)

PATH, TOKEN_HEADER = "/v1/runtime/send-task-heartbeat", "flwr-task-token"
_EVERY_SECONDS = 10.0
_TIMEOUT = 20.0


@contextmanager
def beating(program: str, arguments: Sequence[str]) -> Iterator[None]:
    """Send heartbeats in the background.

    Args:
        program: Flower's name for it, `flwr-serverapp` or `flwr-clientapp`.
        arguments: of that program, which say where to, and where the token is.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--insecure", action="store_true")
    for name in ("--runtime-api-address", task_token.TOKEN_FILE, "--root-certificates"):
        parser.add_argument(name)
    known, _ = parser.parse_known_args(arguments)
    if not (known.runtime_api_address and known.token_file and (known.root_certificates or known.insecure)):
        yield  # no program of Flower's would start like this; it says why itself
        return
    token = task_token.read(known.token_file)
    done = threading.Event()
    context = None if known.insecure else ssl.create_default_context(cafile=known.root_certificates)

    def beat() -> None:
        while not done.is_set():
            try:
                beat_once(program, known.runtime_api_address, token, context)
            except (OSError, http.client.HTTPException) as error:
                log.debug("no heartbeat: %s", error)  # Flower tries again, and says what is wrong
            done.wait(_EVERY_SECONDS)

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def beat_once(program: str, address: str, token: str, context: ssl.SSLContext | None) -> int:
    """Send one heartbeat: a message without fields, hence without bytes. Returns the HTTP status.

    Args:
        program: Flower's name for it.
        address: HOST:PORT.
        token: the task's.
        context: for TLS; None on a site's loopback, where there is none.
    """
    headers = {
        "content-type": "application/protobuf",
        "accept": "application/protobuf",
        "flwr-package-name": "flwr",
        "flwr-package-version": version("flwr"),
        "flwr-component-name": program,
        TOKEN_HEADER: token,
    }
    if context is None:
        opened = http.client.HTTPConnection(address, timeout=_TIMEOUT)
    else:
        opened = http.client.HTTPSConnection(address, context=context, timeout=_TIMEOUT)
    with closing(opened) as connection:
        connection.request("POST", PATH, b"", headers)
        return connection.getresponse().status
