"""The resident site process: `python -m quorate.client.process.main FOLDER`, where FOLDER holds site.yaml.

    socket -> service -> book of runs -> policy, read again -> limits -> privacy ledger -> stored answers
        -> site (rows, base model, trainer)

It runs in the foreground until SIGTERM or SIGINT; training then ends at its next step, and whoever asked asks
the next process again.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from quorate.client.data.changes import SeenRows
from quorate.client.data.run_rows import read_rows
from quorate.client.data.split_key import SiteSplits, look_at_splits, open_splits
from quorate.client.models.base_models import at_site as model_at_site
from quorate.client.node.folder import SiteFolder
from quorate.client.policy.answer_store import Answered
from quorate.client.policy.gate import check_rows, check_steps
from quorate.client.policy.limits import Limited
from quorate.client.privacy.budgets import Budgets, Spending, spending
from quorate.client.privacy.ledger import DATABASE, HEADS, open_ledger
from quorate.client.privacy.spending_gate import Accounted
from quorate.client.privacy.units import groups_of, plan_of
from quorate.client.process.grpc_server import SiteService
from quorate.client.process.handler import Handler
from quorate.client.process.reload import Current
from quorate.client.runs.message_log import Recorded
from quorate.client.runs.run_history import DATABASE as RUNS
from quorate.client.runs.run_history import RunHistory
from quorate.client.site.data_source import SiteRows
from quorate.client.site.device_errors import LOST_EXIT
from quorate.client.site.request_checks import BaseLimits
from quorate.client.site.site import Site
from quorate.client.trainer.sampling import few_shot
from quorate.shared.config.privacy_config import SitePrivacy
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import BadInput, ConfigError, QuorateError
from quorate.shared.model.base_model import default_device
from quorate.shared.privacy.accounting import epsilon
from quorate.shared.privacy.privacy_event import PrivacyEvent
from quorate.shared.progress import StepEvent
from quorate.shared.tasks.task import Row

log = logging.getLogger("quorate.client.process.main")  # by name: as a program, this module is __main__

ANSWERS_FILE, RECEIVED = "answers.db", "received"
"""In STATE: what was answered, and the results of runs that are done."""


@dataclass
class AtSite:
    """What one site holds, as its site.yaml says (quorate.client.site.data_source.Holdings).

    Rows are read when a run that was let through first asks for them, and kept until a run asks for others,
    or until one begins (`forget`).

    Args:
        folder: the site's; replaced by whoever reads site.yaml again.
        looks_only: whether nothing is to be written, as by commands that another user may give.
    """

    folder: SiteFolder
    looks_only: bool = False
    readings: int = 0
    _rows: dict[tuple[object, ...], SiteRows] = field(default_factory=dict)
    _units: dict[tuple[object, ...], set[bytes]] = field(default_factory=dict)
    _seen: SeenRows = field(default_factory=SeenRows)

    @property
    def names(self) -> tuple[str, ...]:
        """This site alone."""
        return (self.folder.connection.site,)

    def rows(self, run: RunConfig, site: str) -> SiteRows:
        """Return the rows that the run's data alias stands for here, with the task's columns alone."""
        key = self._key(run)
        if key not in self._rows:
            self.forget()  # before the next ones take their memory
            where = f"site.yaml, data.{run.data}"
            try:
                source, held = self.folder.config.data[run.data], self._splits()
                splits, units = read_rows(run, source, self.folder.path, held)
            except BadInput as error:
                raise type(error)(f"{where}: {error}") from error
            self._units = {key: units}
            self._rows[key] = {
                split: [Row(row.values, row.source, group=row.group) for row in rows]
                for split, rows in splits.items()
            }
            log.info("%s: %s", where, self._seen.describe(run.data, key, self._rows[key]))
        rows = self._rows[key]
        check_rows(self.folder.config, run.data, len(rows["train"]))
        if run.training.max_steps is None:
            used = few_shot(run, site, rows["train"])
            check_steps(self.folder.config, run, len(set(groups_of(run, site, used) or range(len(used)))))
        return rows

    def _key(self, run: RunConfig) -> tuple[object, ...]:
        """Return what decides which rows a run has."""
        # Not every task has labels; those that have list them under this name.
        labels: tuple[str, ...] = getattr(run.task, "labels", ())
        unit = run.privacy.unit if isinstance(run.privacy, SitePrivacy) else None
        source = self.folder.config.data[run.data].model_dump_json()
        return run.data, tuple(run.task.columns.items()), labels, source, unit

    def _splits(self) -> SiteSplits | None:
        """Return how rows are placed; None for who only looks at a site that has never read any."""
        return look_at_splits(self.folder) if self.looks_only else open_splits(self.folder)

    def write_down(self, run: RunConfig) -> None:
        """Keep for good which rows a private run is about to be trained on: they are not measured again.

        Raises: as `rows`; OutputError: it could not be written.
        """
        (name,) = self.names
        self.rows(run, name)
        open_splits(self.folder).write_down(self._units[self._key(run)])

    def use(self, folder: SiteFolder) -> None:
        """Take over site.yaml as it is now."""
        self.folder = folder

    def forget(self) -> None:
        """Have the rows read again when they are next asked for: a run begins."""
        self._rows.clear()
        self.readings += 1

    def spending(self, run: RunConfig) -> Spending:
        """Return what a run with record- or group-level privacy costs here.

        Raises: as `rows`; ConfigError, DataError: of `plan_of`.
        """

        def event_of(run: RunConfig) -> PrivacyEvent:
            (name,) = self.names
            plan = plan_of(run, name, self.rows(run, name)["train"])
            assert plan is not None, "only asked for private runs"
            return plan.event()

        return spending(run, self.folder.config, self.folder.path, event_of)

    @property
    def base_limits(self) -> BaseLimits:
        """How far site.yaml lets a rule move the base model."""
        policy = self.folder.config.policy
        return BaseLimits(policy.max_residual_rank, policy.max_base_change)

    def at_hand(self, run: RunConfig) -> RunConfig:
        """Return the run with the folder of its base model here."""
        return model_at_site(run, self.folder.config, self.folder.path)


def training_device(name: str) -> torch.device:
    """Return the device that site.yaml names.

    Raises: ConfigError: this machine has no such device.
    """
    if name == "auto":
        return default_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"site.yaml, device: this machine cannot compute on {name!r} "
            f"({str(error).splitlines()[0][:200]}); write cpu, cuda, cuda:N or auto."
        ) from error
    return device


def account_for(folder: SiteFolder, at_site: AtSite, answered: Answered) -> Accounted:
    """Put a site's privacy ledger before its stored answers.

    A ledger that is needed or there is looked at now; where it is not what was written, that is logged, and
    private runs are refused until it is.
    """

    def budgets() -> Budgets:
        return Budgets(at_site.folder.config, at_site.folder.path, epsilon)

    accounted = Accounted(
        lambda: open_ledger(folder), budgets, at_site.spending, answered, write_down=at_site.write_down
    )
    policy = folder.config.policy
    files = (folder.ledger / DATABASE, folder.anchor / HEADS)
    if policy.require_privacy or policy.privacy_budgets or any(path.exists() for path in files):
        try:
            accounted.open()
        except BadInput as error:
            log.error("%s", error)
    return accounted


def front_of(
    folder: SiteFolder, at_site: AtSite, book: RunHistory, accounted: Handler
) -> tuple[Handler, Limited]:
    """Put the site's word before its ledger: books, rules as they are now, limits.

    Returns: the outermost handler, and the one to be told of optimiser steps.
    """
    limited = Limited(lambda: at_site.folder.config.policy, book, at_site.forget, accounted)
    return Recorded(book, folder.connection, Current(folder, at_site.use, limited)), limited


def serve(folder: SiteFolder, stop: threading.Event) -> int:
    """Answer requests until `stop` is set, or the device is lost.

    Returns: the exit code.
    Raises: ConfigError, OutputError: the process cannot begin.
    """
    name = folder.connection.site
    device = training_device(folder.config.device)
    folder.state.mkdir(mode=0o750, parents=True, exist_ok=True)
    services: list[SiteService] = []
    limits: list[Limited] = []

    def on_step(event: StepEvent) -> None:
        services[0].check_stopping()
        limits[0].on_step(event)
        if not event.taken:
            return
        loss = "" if event.loss is None else f", loss {event.loss:.4f}"
        log.debug("round %d, step %d of %d%s", event.round, event.step, event.steps, loss)

    def on_model(loaded: bool) -> None:
        services[0].model_loaded(loaded)

    received, at_site = folder.state / RECEIVED, AtSite(folder)
    site = Site(at_site, device=device, on_step=on_step, on_model=on_model, received=received)
    answered = Answered(folder.state / ANSWERS_FILE, site)
    accounted = account_for(folder, at_site, answered)
    book = RunHistory(folder.state / RUNS)
    front, limited = front_of(folder, at_site, book, accounted)
    limits.append(limited)
    lost = threading.Event()

    def on_lost() -> None:
        lost.set()
        stop.set()

    def grid() -> float:
        return at_site.folder.config.policy.answer_grid_seconds

    services.append(SiteService(front, name, folder.socket, grid=grid, on_lost=on_lost))
    book.settle()
    services[0].start()
    log.info("site %s: ready at %s, training on %s", name, folder.socket, device)
    stop.wait()
    log.info("site %s: ending", name)
    services[0].stop()
    accounted.close()
    answered.close()
    book.close()
    return LOST_EXIT if lost.is_set() else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the site process of a folder in the foreground; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m quorate.client.process.main", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="folder of site.yaml and connection.yaml")
    parser.add_argument("--verbose", action="store_true", help="log every optimiser step")
    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr, force=True
    )
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)  # libraries on their own future
    logging.getLogger("quorate").setLevel(logging.DEBUG if options.verbose else logging.INFO)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    os.umask(0o077)
    try:
        return serve(SiteFolder.find(options.folder), stop)
    except QuorateError as error:
        log.error("%s", error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
