"""Which releases work together. Server and site say theirs before the first round."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version

from quorate.shared.errors import QuorateError

QUORATE = "0.1.0"
"""This release; the packages take their version from here."""
LIBRARIES = ("torch", "transformers", "peft")
"""What training depends on; the same major version must be on both sides."""


class VersionMismatch(QuorateError):
    """Server and site run releases that do not work together."""

    code = "version"


def versions() -> dict[str, str]:
    """Return the versions of this installation, by name."""
    return {"quorate": QUORATE, **{name: _version(name) for name in LIBRARIES}}


@cache  # what is imported stays what it is, and reading it takes milliseconds: seconds for 1,000 sites
def _version(name: str) -> str:
    return version(name)


def check_versions(theirs: Mapping[str, str]) -> None:
    """Compare with this installation: Quorate to the minor version, libraries to the major one.

    Raises: VersionMismatch: naming what differs and what to install.
    """
    ours = versions()
    parts = {"quorate": 2, **dict.fromkeys(LIBRARIES, 1)}
    wrong = [
        f"{name} {theirs.get(name, 'unknown')} against {ours[name]}"
        for name, count in parts.items()
        if theirs.get(name, "").split(".")[:count] != ours[name].split(".")[:count]
    ]
    if wrong:
        raise VersionMismatch(
            f"runs other releases ({'; '.join(wrong)}): install at the site what the server runs, or the "
            "other way round."
        )
