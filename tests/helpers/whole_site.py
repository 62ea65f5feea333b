"""A site process without its socket."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml
from site_folder import fix_splits

from quorate.client.node.folder import SiteFolder
from quorate.client.process.chain import build_chain
from quorate.client.site.delivered import RECEIVED
from quorate.client.site.site import Site
from quorate.client.site.site_data import SiteData
from quorate.shared.protocol.messages import RoundRequest, Update


class WholeSite:
    """A site process in this one.

    Args:
        folder: of site.yaml.
    """

    def __init__(self, folder: SiteFolder) -> None:
        self.folder = folder
        self.steps = self.passes = 0
        self.on_step: Callable[[], None] = lambda: None
        fix_splits(folder)
        self.start()

    def start(self) -> None:
        """Begin, as a new process does."""
        self.folder = SiteFolder.find(self.folder.path)
        self.at_site = SiteData(self.folder)
        site = Site(self.at_site, on_step=self._step, received=self.folder.state / RECEIVED)
        self.chain = build_chain(self.folder, self.at_site, site)
        self.chain.book.settle()

    def stop(self) -> None:
        """End."""
        self.chain.close()

    def restart(self) -> None:
        """End, and begin again."""
        self.stop()
        self.start()

    def configure(self, **policy: Any) -> None:
        """Change the policy in site.yaml, as a person does while the process runs."""
        path = self.folder.path / "site.yaml"
        content = yaml.safe_load(path.read_text())
        content["policy"] |= policy
        path.write_text(yaml.safe_dump(content))

    def rewrite(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change anything in site.yaml."""
        path = self.folder.path / "site.yaml"
        content = yaml.safe_load(path.read_text())
        change(content)
        path.write_text(yaml.safe_dump(content))

    def ask(self, asked: RoundRequest) -> Update:
        """Answer one request as it comes from the socket."""
        return self.chain.answer(RoundRequest.decode(asked.encoded))

    def _step(self, event: Any) -> None:
        self.passes += 1
        self.steps += event.taken
        self.chain.on_step(event)
        self.on_step()
