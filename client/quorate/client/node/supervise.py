"""A site's supervisor as a process of its own: reading site.yaml takes torch, and this one stays for weeks.

`python -m quorate.client.node.supervise FILE` runs the programs that FILE lists.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from quorate.shared.errors import QuorateError
from quorate.shared.process.files import write_atomically
from quorate.shared.process.supervised import refuse_second
from quorate.shared.process.supervisor import Program, Supervisor

_FILE = "programs.json"
_PATHS = ("log", "cwd")


def become_supervisor(state_dir: Path, programs: Sequence[Program]) -> NoReturn:
    """Write the programs down and turn this process into their supervisor.

    Args:
        state_dir: the supervisor's folder, private to whoever starts the site.
        programs: in the order they start.
    Raises: OutputError: it cannot be written, or another supervisor has the folder.
    """
    refuse_second(state_dir)
    path = state_dir / _FILE
    content = json.dumps([asdict(program) for program in programs], default=str, indent=2)
    write_atomically(path, content.encode())  # another one that begins now reads all of it
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-m", "quorate.client.node.supervise", str(path)])


def read_programs(path: Path) -> list[Program]:
    """Return what `become_supervisor` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return [
        Program(**{**each, **{name: Path(each[name]) for name in _PATHS if each[name] is not None}})
        for each in content
    ]


def main(arguments: list[str]) -> int:
    """Run the programs until SIGTERM or SIGINT; returns the exit code."""
    path = Path(arguments[0])
    return in_foreground(lambda: Supervisor(path.parent, read_programs(path)).run())


def in_foreground(work: Callable[[], int | None]) -> int:
    """Do the work of a program of a site, with its log on stderr; returns the exit code."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr, force=True
    )
    try:
        return work() or 0
    except QuorateError as error:
        logging.getLogger(__name__).error("%s", error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
