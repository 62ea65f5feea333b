"""The rules as they are now: site.yaml is read again for every request, and what changed in it is logged.

One request is held against one reading of the file from its beginning to its end. A file that cannot be
read or does not validate refuses every request (`site-file`) until it is mended: rules that were replaced are
never fallen back to. What only a start of the process can take over is said in the log.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from quorate.client.health.site_file import AT_START, IN_USE, InUse
from quorate.client.node.folder import SITE_YAML, SiteFolder
from quorate.client.policy.gate import Gate
from quorate.client.policy.site_config import SiteConfig
from quorate.client.site.request import Handler, Request, failed
from quorate.shared.errors import ConfigError, QuorateError, RequestRefused
from quorate.shared.process.files import write_atomically
from quorate.shared.protocol.messages import Update

log = logging.getLogger(__name__)

SETTLE_SECONDS = 0.3
"""A file that has changed is read once more after so long: whoever writes it may be in the middle."""
_TRIES = 20
_SHOWN = 12


class SiteFileGate:
    """A handler that lets through what the policy allows as site.yaml has it at this request.

    Args:
        folder: the site's, as it was when the process started: where its state lies does not move.
        take: told of the folder with its configuration as it is now, before a request is answered by it.
        inner: answers what is let through.
    """

    def __init__(self, folder: SiteFolder, take: Callable[[SiteFolder], None], inner: Handler) -> None:
        self._state = folder.state
        self._path = folder.path / SITE_YAML
        self._first = folder.config
        self._now = folder
        self._take = take
        self._inner = inner
        self._read = self._bytes()
        if SiteFolder(folder.path).config != self._first:  # changed since the process looked first
            self._read = b""
        self._tell()

    def handle(self, request: Request) -> Update:
        try:
            config = self.config()
        except QuorateError as error:
            return failed(request, error)
        return Gate(config, self._state, self._inner).handle(request)

    def config(self) -> SiteConfig:
        """Return site.yaml as it is now.

        Raises: RequestRefused: it cannot be used.
        """
        for _ in range(_TRIES):
            content = self._bytes()
            if content and content == self._read:
                return self._now.config
            time.sleep(SETTLE_SECONDS)
            fresh = SiteFolder(self._now.path)
            try:
                found: SiteConfig | ConfigError = fresh.config
            except ConfigError as error:
                found = error
            if self._bytes() != content:
                continue
            if isinstance(found, ConfigError):
                message = f"nothing is answered until site.yaml is mended: {found}"
                raise RequestRefused(message, code="site-file")
            self._replace(fresh, content)
            return found
        raise RequestRefused(f"{self._path} is being written all the time; let it be.", code="site-file")

    def _bytes(self) -> bytes:
        """Return what the file holds; nothing where it cannot be read: loading it then says why."""
        try:
            return self._path.read_bytes()
        except OSError:
            return b""

    def _replace(self, fresh: SiteFolder, content: bytes) -> None:
        changed = list(
            changes(self._now.config.model_dump(mode="json"), fresh.config.model_dump(mode="json"))
        )
        more = f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        said = "; ".join(changed[:_SHOWN]) + more if changed else "nothing that means anything"
        log.info("site.yaml was changed and is in use now: %s", said)
        self._now, self._read = fresh, content
        waiting = self._at_start()
        if waiting:
            log.warning(
                "site.yaml: %s changed, and the process goes on with what it was started with; `quorate site "
                "stop`, then `quorate site start`.",
                ", ".join(waiting),
            )
        self._take(fresh)
        self._tell()

    def _at_start(self) -> tuple[str, ...]:
        return tuple(
            name for name in AT_START if getattr(self._now.config, name) != getattr(self._first, name)
        )

    def _tell(self) -> None:
        in_use = InUse(sha256=hashlib.sha256(self._read).hexdigest(), at_start=self._at_start())
        write_atomically(self._state / IN_USE, in_use.model_dump_json().encode() + b"\n")


def changes(before: Any, now: Any, where: str = "") -> Iterator[str]:
    """Yield what differs between two configurations, as `policy.max_rank: 64, now 16`."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys((*before, *now)):
            inside = f"{where}.{name}" if where else str(name)
            if name not in now:
                yield f"{inside}: taken out"
            elif name not in before:
                yield f"{inside}: new, {_short(now[name])}"
            else:
                yield from changes(before[name], now[name], inside)
    elif before != now:
        yield f"{where}: {_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."
