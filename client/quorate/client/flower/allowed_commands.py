"""The only commands that Flower's processes at a site find: STATE/bin is their whole PATH.

Flower starts its programs by name, and which one the coordinator decides: a run of type `agentapp` starts
`flwr-agentapp`, which executes the bundle's code as readily as `flwr-clientapp` does. So all names are ours:
one is the guarding launcher, the others refuse, and a name that a later Flower adds is not found.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from quorate.shared.process.files import write_atomically

GUARDED = "flwr-clientapp"
REFUSING = ("flwr-agentapp", "flwr-connector", "flwr-model", "flwr-serverapp", "flwr-simulation")
_LAUNCHER = "quorate.client.flower.bundle_guard_main"


def write_commands(folder: Path, python: str = sys.executable) -> None:
    """Write the commands into STATE/bin.

    Args:
        folder: made if need be; whoever runs Flower must not be able to write there.
        python: the interpreter, by its absolute path.
    """
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    for stale in folder.iterdir():
        stale.unlink()
    # -P: no folder of the caller's is searched for modules before ours.
    _write(folder / GUARDED, f'exec {shlex.quote(python)} -P -m {_LAUNCHER} "$@"')
    for name in REFUSING:
        _write(
            folder / name,
            f"echo 'ERROR quorate: refused to start {name}: this site answers ClientApp messages of quorate "
            "alone; somebody started another kind of run at the coordinator: tell its people.' >&2; exit 1",
        )


def _write(path: Path, line: str) -> None:
    write_atomically(path, f"#!/bin/sh\n# Written by quorate at each start.\n{line}\n", 0o755)
