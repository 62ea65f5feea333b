"""All handlers of a site process, nested as `serve` nests them, without the socket."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml
from site_folder import fix_splits

from quorate.client.node.folder import SiteFolder
from quorate.client.policy.answer_store import Answered
from quorate.client.process import main
from quorate.client.runs.run_history import DATABASE, RunHistory
from quorate.client.site.site import Site
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
        self.at_site = main.AtSite(self.folder)
        site = Site(self.at_site, on_step=self._step, received=self.folder.state / main.RECEIVED)
        self._answered = Answered(self.folder.state / main.ANSWERS_FILE, site)
        self._accounted = main.account_for(self.folder, self.at_site, self._answered)
        self._book = RunHistory(self.folder.state / DATABASE)
        self._book.settle()
        self._front, self._limited = main.front_of(self.folder, self.at_site, self._book, self._accounted)

    def stop(self) -> None:
        """End."""
        for each in (self._accounted, self._answered, self._book):
            each.close()

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
        (update,) = self._front.handle([RoundRequest.decode(asked.encoded)])
        return update

    def _step(self, event: Any) -> None:
        self.passes += 1
        self.steps += event.taken
        self._limited.on_step(event)
        self.on_step()
