"""`python -m quorate.deploy.server.flower_main NAME ...`: one of Flower's programs, with this very Python.

Its scripts need not be on the PATH then, and a PATH cannot name others. A SuperExec started like this gives
no task's token away in the arguments of what it starts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import distribution

from quorate.shared.process import task_token
from quorate.shared.process.heartbeat import beating

SERVERAPP, SUPEREXEC = "flwr-serverapp", "flower-superexec"


def load(name: str, arguments: list[str]) -> Callable[[], int | None]:
    """Return a program of Flower's; loading it takes seconds, and more where the machine is busy."""
    alive = beating(name, arguments) if name == SERVERAPP else nullcontext()
    with alive:
        entries = distribution("flwr").entry_points
        program: Callable[[], int | None] = entries.select(group="console_scripts", name=name)[name].load()
        if name == SERVERAPP:  # with all that a run needs: once Flower runs it, this takes its time as well
            import quorate.server.federation.flower_app  # noqa: F401
        if name == SUPEREXEC:
            from quorate.client.flower.flower_internals import superexec

            task_token.install(superexec()[0])
    return program


if __name__ == "__main__":
    _, name, *arguments = sys.argv
    sys.argv = [name, *arguments]
    sys.exit(load(name, arguments)())
