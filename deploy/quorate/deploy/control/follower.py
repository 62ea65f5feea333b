"""What a person sees of a federated run: the table of who joined, then progress as a simulation shows it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from quorate.deploy.console import ConsoleTracker
from quorate.server.tracking.events import Event, LogMessage, Refused, Started
from quorate.server.tracking.records import Exclusion
from quorate.shared.protocol.messages import SiteDescription

_LABELS_SHOWN = 3


class Follower:
    """Passes a run's events to a console.

    Args:
        output_dir: where the results will lie, named in the place of the run's own folder.
    """

    def __init__(self, console: Console, *, quiet: bool = False, output_dir: Path | None = None) -> None:
        self.tracker = ConsoleTracker(console, quiet=quiet)
        self._console = console
        self._quiet = quiet
        self._output_dir = output_dir
        self._refused: dict[str, Exclusion] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, Refused):
            self._refused = event.sites
        if isinstance(event, Started):
            self.tracker.close()  # a ServerApp that died left its bar behind
            if not self._quiet:
                self._console.print(joining_table(event.sites, self._refused, event.run.model.sha256))
            self._refused = {}
            if self._output_dir:
                event = event.model_copy(update={"output_dir": str(self._output_dir)})
        if isinstance(event, LogMessage):
            logging.getLogger(event.logger).log(event.level, "%s", event.text)
        self.tracker(event)

    def say(self, text: str) -> None:
        """Write a line of the controller's own, also where progress is quiet: something went wrong."""
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        self.tracker.close()


def joining_table(
    sites: Mapping[str, SiteDescription], refused: Mapping[str, Exclusion], sha256: str | None
) -> Table:
    """Return who takes part, with which rows, labels, model and releases, and who does not, and why.

    Args:
        sites: what the sites that joined said of themselves.
        sha256: the base model's, as in the run file.
    """
    table = Table("site", "state", "rows", "labels", "model", "quorate", "torch", box=SIMPLE)
    table.columns[2].justify = "right"
    for name, site in sites.items():
        rows = " / ".join(str(site.rows.get(split, 0)) for split in ("train", "validation", "test"))
        model = f"{site.model_sha256[:8]} {'ok' if site.model_sha256 == sha256 else 'differs'}"
        releases = [_plain(site.versions.get(each, "?")) for each in ("quorate", "torch")]
        table.add_row(_plain(name), "joined", rows, _plain(_labels(site)), model, *releases)
    for name, why in refused.items():
        table.add_row(_plain(name), _plain(why.reason), "", "", "", "", "", style="red")
    table.caption = "rows: train / validation / test"
    return table


def _labels(site: SiteDescription) -> str:
    """Return the most frequent labels with their shares, and how many there are of all."""
    counts = {label: count for label, count in site.label_counts.items() if count}
    total = sum(counts.values())
    if not total:
        return "-"
    most = sorted(counts, key=lambda label: -counts[label])
    shown = ", ".join(f"{label} {100 * counts[label] / total:.0f} %" for label in most[:_LABELS_SHOWN])
    more = f", {len(counts)} of {len(site.label_counts)}" if len(site.label_counts) > _LABELS_SHOWN else ""
    return shown + more


def _plain(text: str) -> Text:
    """Return a site's words so that they can neither steer a terminal nor pass for markup."""
    return Text("".join(c if c.isprintable() else " " for c in text))
