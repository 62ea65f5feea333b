"""Stands as `flwr-clientapp` on the SuperNode's PATH: admits our bundle alone, and runs nothing out of any.

Flower's own program installs whatever bundle the coordinator sends and imports the code in it. This one runs
Flower's program with four of its names replaced: what was pulled is checked, nothing is installed, no
dependencies are fetched, and the ClientApp is the one of this installation, or one that refuses.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from quorate.client.node.names import QUIET

os.environ.update(QUIET)  # before flwr is imported, which reads it then

from flwr.app import Context, Error, Message

from quorate.client.flower.admitted_bundle import BundleRefused, check_bundle, check_overrides
from quorate.client.flower.flower_internals import clientapp
from quorate.shared.errors import QuorateError

log = logging.getLogger(__name__)

REPLACED = ("pull_task_input", "install_from_fab", "install_app_dependencies", "get_load_client_app_fn")
"""Names in the runtime of `clientapp`, which its function run_clientapp must call by name."""
REFUSED = 1002
"""Flower error code of a refusal; the reason is our error code alone."""


class Guard:
    """Judges the one message that this process was started for."""

    def __init__(self) -> None:
        self._refusal: str | None = BundleRefused.code  # until something was admitted

    def install(self, runtime: ModuleType) -> None:
        """Replace Flower's names.

        Raises: QuorateError: this version of Flower works in another way; nothing may run then.
        """
        called = set(runtime.run_clientapp.__code__.co_names)
        if missing := [name for name in REPLACED if name not in called or not hasattr(runtime, name)]:
            raise QuorateError(
                f"this version of flwr no longer has {', '.join(missing)}, so bundles cannot be guarded; "
                "install the version that quorate asks for."
            )
        pull = runtime.pull_task_input
        replacements: dict[str, Callable[..., Any]] = {
            "pull_task_input": lambda client: self.admit(*pull(client)),
            "install_from_fab": _install_nothing,
            "install_app_dependencies": _install_nothing,
            "get_load_client_app_fn": lambda **_: self.client_app,
        }
        for name in REPLACED:
            setattr(runtime, name, replacements[name])

    def admit(self, message: Message, context: Context, run: Any, fab: Any) -> tuple[Any, ...]:
        """Judge what was pulled from the SuperNode, and hand it on."""
        try:
            check_bundle(fab.content)
            check_overrides(run.override_config)
            self._refusal = None
        except QuorateError as error:
            log.error("refused a message of Flower run %s: %s", run.run_id, error)
        except Exception:  # whatever a bundle does to the check, it is not admitted
            log.exception("refused a message of Flower run %s: its bundle cannot be read", run.run_id)
        return message, context, run, fab

    def client_app(self, *_: str) -> Callable[[Message, Context], Message]:
        """Return the ClientApp of this installation, or one that answers with the refusal."""
        if self._refusal is None:
            from quorate.client.process.flower_app import app

            return app
        code = self._refusal
        return lambda message, context: Message(Error(REFUSED, code), reply_to=message)


def _install_nothing(*_: object, **__: object) -> None:
    """Stand where Flower would install what it was sent."""


def load() -> None:
    """Import all that an answer needs: this is what takes time."""
    clientapp()
    importlib.import_module("quorate.client.process.flower_app")


def main() -> None:
    """Answer one message as Flower's `flwr-clientapp` does, under guard."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("quorate").setLevel(logging.INFO)
    logging.getLogger("flwr").propagate = False  # it has a handler of its own
    runtime, program = clientapp()
    Guard().install(runtime)
    program()
