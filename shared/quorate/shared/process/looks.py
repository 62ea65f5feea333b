"""What `status` and `check` look at, at both ends: one line each, and what would make the next round fail."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from quorate.shared.config.config_model import ConfigModel
from quorate.shared.errors import NotReady, QuorateError

LEAST_BYTES = 2**30
"""Free bytes of a disk below which the next round may fail: an adapter and its answers go there."""
LEAST_FILES = 1000
"""Files that a disk must have room for, where it counts them."""
LEAST_DAYS, SOON_DAYS = 14, 30
"""Days left of a certificate below which it is held for wrong, and below which it is spoken of."""


class Line(ConfigModel):
    """One thing that was looked at."""

    what: str
    ok: bool
    found: str
    """What was found; where it is not right, what to do as well."""
    exit_code: int = 0
    """0: right. 1: the machine, the network or the other end is in no state for the next round. 2: a file of
    one's own is wrong."""


def line(what: str, look: Callable[[], str]) -> Line:
    """Look at something; whatever is wrong with it goes into the line."""
    try:
        return Line(what=what, ok=True, found=look())
    except QuorateError as error:
        return Line(what=what, ok=False, found=str(error), exit_code=1 if isinstance(error, NotReady) else 2)
    except OSError as error:
        found = f"{error.filename}: {error.strerror}; give the command as the folder's owner, or as root."
        return Line(what=what, ok=False, found=found, exit_code=2)


def exit_code(lines: list[Line]) -> int:
    """Return what a command that shows these lines ends with: 2 before 1, 0 where all is right."""
    return max((each.exit_code for each in lines), default=0)


def check_room(folders: Mapping[str, Path], least: int = LEAST_BYTES) -> str:
    """Look whether the disks that folders lie on have room; returns how much there is.

    Args:
        folders: name -> folder; one that is not there yet counts as the first one above it that is.
        least: free bytes, for users other than root, that a disk must have.
    Raises: NotReady: one has less, or room for fewer than LEAST_FILES files; names every such disk.
    """
    disks: dict[int, tuple[Path, list[str]]] = {}
    for name, folder in folders.items():
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        disks.setdefault(there.stat().st_dev, (there, []))[1].append(name)
    full, found = [], []
    for folder, names in disks.values():
        about = os.statvfs(folder)
        free = about.f_bavail * about.f_frsize
        said = f"{folder} ({', '.join(names)}): {in_units(free)} free"
        if free < least:
            full.append(f"{said}, and {in_units(least)} are needed; make room there")
        elif about.f_files and about.f_favail < LEAST_FILES:
            full.append(f"{said}, but for {about.f_favail} more files alone; delete some there")
        found.append(said)
    if full:
        raise NotReady(f"{'; '.join(full)}.", kind="no-room")
    return "; ".join(found)


def check_days(what: str, begins: datetime, until: datetime, remedy: str) -> str:
    """Look whether a certificate is good for long enough; returns until when it is.

    Args:
        what: whose it is, such as its file.
        begins: when it begins to be good (UTC).
        until: when it ends (UTC).
        remedy: what to do where it is not.
    Raises: NotReady: it has ended, will within LEAST_DAYS days, or has not begun.
    """
    left, end = days_left(until), f"{until:%Y-%m-%d %H:%M} UTC"
    if days_left(begins) > 0:
        raise NotReady(
            f"{what}: is good from {begins:%Y-%m-%d %H:%M} UTC on alone; set this machine's clock right, or "
            f"{remedy}.",
            kind="not-yet-valid",
        )
    if left < 0:
        message = f"{what}: expired at {end}; {remedy}, or set this machine's clock right."
        raise NotReady(message, kind="expired")
    if left < LEAST_DAYS:
        raise NotReady(f"{what}: {left:.1f} days left, until {end}; {remedy}.", kind="ends-soon")
    return f"valid until {until:%Y-%m-%d}" + (f", soon: {remedy}" if left < SOON_DAYS else "")


def days_left(until: datetime) -> float:
    """Return the days from now to `until`; negative when that is past."""
    return (until - datetime.now(UTC)).total_seconds() / 86400


def in_units(size: int) -> str:
    """Return a number of bytes as people read it: 12.3 MB."""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"
