"""Turns into a program that the kernel ends (SIGTERM) when the process that started it is gone.

`python -I -S end_with_parent.py PARENT FD COMMAND ...`: PARENT is the process id of whoever starts it; FD is
a pipe that is closed once the program runs, and gets the number of the error where it cannot be run.

The kernel forgets what was asked of it when a process changes its user. So it is asked here, after that:
where threads run, no Python may run between fork and exec.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: int, pipe: int, command: list[str]) -> None:
    """Become the program. Returns where it cannot be run."""
    os.set_inheritable(pipe, False)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died in between
        return
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python has ignored, and programs go by
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(pipe, str(error.errno).encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    sys.exit(1)
