"""Python imports this file as it starts, where PYTHONPATH names the folder: notes what asks for a network.

One line per audit event goes to the file that SOCKET_LOG names. Unix sockets stay on this machine and are
left out; a socket of any other family is noted when it is made, before it has connected to anything.
"""

import os
import socket
import sys
from typing import Any

_LOG = os.open(os.environ["SOCKET_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
_LOCAL = ("socket.gethostname", "socket.sethostname")  # system calls, not look-ups


def _note(line: str) -> None:
    os.write(_LOG, f"{os.getpid()} {line}\n".encode())  # one write to an O_APPEND file: lines never mix


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not event.startswith("socket.") or event in _LOCAL:
        return
    if arguments and isinstance(arguments[0], socket.socket):
        family = arguments[1] if event == "socket.__new__" else arguments[0].family
        if family == socket.AF_UNIX:
            return
        arguments = arguments[1:]
    _note(f"{event} {arguments!r}")


_note("watching")
sys.addaudithook(_hook)
