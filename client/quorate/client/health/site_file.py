"""Which reading of site.yaml a running site process works by, for `quorate site check` and `status`.

STATE/site-file.json is written by the site process (quorate.client.process.reload). No torch here.
"""

from __future__ import annotations

import hashlib
from typing import Literal

from pydantic import ValidationError

from quorate.client.node.folder import SITE_YAML, SiteFolder
from quorate.shared.config.config_model import ConfigModel
from quorate.shared.errors import ConfigError
from quorate.shared.process.files import holder

AT_START = ("device", "users", "state", "anchor")
"""Fields of site.yaml that a start of the process takes over, and nothing else."""
IN_USE = "site-file.json"


class InUse(ConfigModel):
    """Which reading of site.yaml a site process works by."""

    sha256: str
    """Of the file's bytes."""
    at_start: tuple[str, ...] = ()
    """Fields that were changed since and wait for a start of the process."""


class SiteFileState(ConfigModel):
    """How a running site process stands to site.yaml as it is on disk."""

    state: Literal["in use", "changed", "restart"]
    """`changed`: the next request is answered by it; `restart`: some of it waits for a start of the site."""
    fields: tuple[str, ...] = ()
    """What waits for a start."""

    @property
    def said(self) -> str:
        """The same in words."""
        if self.state == "restart":
            return f"{', '.join(self.fields)} changed: `quorate site stop`, then `quorate site start`"
        if self.state == "changed":
            return "changed since the last request; the next one is answered by it as it is now"
        return "the site process works by it as it is now"


def site_file_state(site: SiteFolder) -> SiteFileState | None:
    """Compare site.yaml with what the running site process works by; None where no process runs."""
    if holder(site.socket.with_suffix(".lock")) is None:
        return None
    try:
        in_use = InUse.model_validate_json((site.state / IN_USE).read_bytes())
    except (FileNotFoundError, ValidationError):  # it is starting, or of an earlier release
        return None
    if in_use.at_start:
        return SiteFileState(state="restart", fields=in_use.at_start)
    same = hashlib.sha256((site.path / SITE_YAML).read_bytes()).hexdigest() == in_use.sha256
    return SiteFileState(state="in use" if same else "changed")


def check_process(site: SiteFolder) -> str:
    """Say whether a running process works by site.yaml as it is now.

    Raises: ConfigError: some of it waits for a start.
    """
    running = site_file_state(site)
    if running is not None and running.state == "restart":
        raise ConfigError(f"{SITE_YAML}: {running.said}.")
    return "none runs now" if running is None else running.said
