"""The resident site process: `python -m quorate.client.process.main FOLDER`, where FOLDER holds site.yaml.

    socket -> service -> chain (quorate.client.process.chain) -> site (rows, base model, trainer)

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
from pathlib import Path

from quorate.client.node.folder import SiteFolder
from quorate.client.process.chain import build_chain
from quorate.client.process.grpc_server import SiteService
from quorate.client.site.delivered import RECEIVED
from quorate.client.site.device_errors import LOST_EXIT
from quorate.client.site.loaded import training_device
from quorate.client.site.site import Site
from quorate.client.site.site_data import SiteData
from quorate.shared.errors import QuorateError
from quorate.shared.progress import StepEvent

log = logging.getLogger("quorate.client.process.main")  # by name: as a program, this module is __main__


def serve(folder: SiteFolder, stop: threading.Event) -> int:
    """Answer requests until `stop` is set, or the device is lost.

    Returns: the exit code.
    Raises: ConfigError, OutputError: the process cannot begin.
    """
    name = folder.connection.site
    device = training_device(folder.config.device)
    folder.state.mkdir(mode=0o750, parents=True, exist_ok=True)
    lost = threading.Event()

    def on_step(event: StepEvent) -> None:
        service.check_stopping()
        chain.on_step(event)
        if not event.taken:
            return
        loss = "" if event.loss is None else f", loss {event.loss:.4f}"
        log.debug("round %d, step %d of %d%s", event.round, event.step, event.steps, loss)

    def on_model(loaded: bool) -> None:
        service.model_loaded(loaded)

    def on_lost() -> None:
        lost.set()
        stop.set()

    def grid() -> float:
        return at_site.folder.config.policy.answer_grid_seconds

    at_site = SiteData(folder)
    received = folder.state / RECEIVED
    engine = Site(at_site, device=device, on_step=on_step, on_model=on_model, received=received)
    chain = build_chain(folder, at_site, engine)
    service = SiteService(chain.answer, name, folder.socket, grid=grid, on_lost=on_lost)
    chain.book.settle()
    service.start()
    log.info("site %s: ready at %s, training on %s", name, folder.socket, device)
    stop.wait()
    log.info("site %s: ending", name)
    service.stop()
    chain.close()
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
