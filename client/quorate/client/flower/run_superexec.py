"""Flower's SuperExec, which starts a program for each message without the task's token in its arguments.

Run as a program in place of `flower-superexec`, with its arguments.
"""

from __future__ import annotations

import os

from quorate.client.node.names import QUIET
from quorate.shared.process import task_token


def main() -> None:
    """Run the SuperExec until it ends."""
    os.environ.update(QUIET)  # before flwr is imported, which reads it then
    from quorate.client.flower.flower_internals import superexec

    executor, program = superexec()
    task_token.install(executor)
    program()


if __name__ == "__main__":
    main()
