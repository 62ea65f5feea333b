"""Run a command as a user would, where nothing can be reached, and report every attempt to reach something.

Two watchers that know nothing of each other:

- Python's audit events, in the command and in every Python it starts (`watch/sitecustomize.py`): who asked,
  and for which address. Native code (grpc, tokenizers, torch) does not pass there.
- The kernel's counters, in a network namespace of the command's own with loopback and no route to anywhere.
  Each connection and packet is counted, to loopback too, whoever makes it and in any child process; asking a
  name server is such a packet. This needs root, or user namespaces; without them `counted` is None.

Neither sees native code that has a daemon on this machine look up a name for it, through a Unix socket.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

WATCH = Path(__file__).parent / "watch"
_NEW_USER, _NEW_NET = 0x10000000, 0x40000000  # sched.h
_SET_FLAGS, _UP = 0x8914, 0x1  # sockios.h, if.h


@dataclass(frozen=True)
class Watched:
    """A command that has ended.

    Args:
        asked: Python's audit events, `PID EVENT ARGUMENTS`.
        pythons: how many Python processes were watched.
        counted: the kernel's counters of IP, TCP, UDP and ICMP that changed; None without a namespace.
        refusal: why there was none.
    """

    code: int
    said: str
    asked: list[str]
    pythons: int
    counted: dict[str, int] | None
    refusal: str | None

    @property
    def contacts(self) -> list[str]:
        """What was asked, without sockets that were only made, or bound, and then used for nothing."""
        return [line for line in self.asked if line.split()[1] not in ("socket.__new__", "socket.bind")]


def watch(
    command: Sequence[str | Path], folder: Path, environment: Mapping[str, str] | None = None
) -> Watched:
    """Run `command` in `folder` with next to no environment: a path, an empty home, and `environment`."""
    with tempfile.TemporaryDirectory() as home:
        log, report = Path(home, "sockets.log"), Path(home, "report.json")
        plain = {
            "PATH": os.defpath,
            "HOME": home,
            "OMP_NUM_THREADS": "1",  # see tests/conftest.py
            "PYTHONPATH": str(WATCH),
            "SOCKET_LOG": str(log),
            **(environment or {}),
        }
        inside = [sys.executable, "-I", __file__, report, json.dumps(plain), *command]
        done = subprocess.run(inside, cwd=folder, capture_output=True, text=True)
        assert report.exists(), f"nothing was watched: {done.stdout}{done.stderr}"
        lines = log.read_text().splitlines() if log.exists() else []
        asked = [line for line in lines if not line.endswith(" watching")]
        found = json.loads(report.read_text())
        return Watched(done.returncode, done.stdout + done.stderr, asked, len(lines) - len(asked), **found)


def enter_silence() -> str | None:
    """Move this process into a network namespace with loopback alone; returns why that failed, or None."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    try:
        if libc.unshare(_NEW_NET) != 0:
            if libc.unshare(_NEW_USER | _NEW_NET) != 0:
                return f"unshare: {os.strerror(ctypes.get_errno())}"
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
            Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
        # Up, because without the address ::1 the kernel refuses IPv6 before it counts.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sH22x", b"lo", _UP))
    except OSError as error:  # some systems give a user namespace, but no rights in it
        return f"in a namespace: {error}"
    return None


def counters() -> dict[str, int]:
    """The kernel's counters of this process's network namespace, by `Protocol.Name`."""
    found: dict[str, int] = {}
    lines = [line.split() for line in Path("/proc/self/net/snmp").read_text().splitlines()]
    for names, values in zip(lines[::2], lines[1::2], strict=True):  # a line of names, a line of values
        found |= {names[0] + name: int(value) for name, value in zip(names[1:], values[1:], strict=True)}
    six = Path("/proc/self/net/snmp6")
    if six.exists():  # not where the kernel has no IPv6
        found |= {name: int(value) for name, value in (line.split() for line in six.read_text().splitlines())}
    return found


def main(report: str, environment: str, *command: str) -> int:
    refusal = enter_silence()
    before = counters()
    done = subprocess.run(command, env=json.loads(environment), stdin=subprocess.DEVNULL)
    changed = {name: value - before.get(name, 0) for name, value in counters().items()}
    counted = {name: change for name, change in changed.items() if change}
    Path(report).write_text(json.dumps({"counted": None if refusal else counted, "refusal": refusal}))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
