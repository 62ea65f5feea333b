"""Stands as `flwr-clientapp` on the SuperNode's PATH: admits our bundle alone, and runs nothing out of any.

Flower's own program installs whatever bundle the coordinator sends and imports the code in it. This one runs
Flower's program with four of its names replaced: what was pulled is checked, nothing is installed, no
dependencies are fetched, and the ClientApp is the one of this installation, or one that refuses.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from types import ModuleType
from typing import Any

from quorate.client.node.names import QUIET

os.environ.update(QUIET)  # before flwr is imported, which reads it then

from flwr.app import Context, Error, Message

from quorate.client.flower.flower_internals import build_bundle, clientapp
from quorate.shared.errors import QuorateError
from quorate.shared.protocol.bundle import RUN_KEY, bundle_dir

log = logging.getLogger(__name__)

REPLACED = ("pull_task_input", "install_from_fab", "install_app_dependencies", "get_load_client_app_fn")
"""Names in the runtime of `clientapp`, which its function run_clientapp must call by name."""
_RUN_ID = re.compile(r"[0-9a-f]{16}")
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


class BundleRefused(QuorateError):
    """A bundle, or a run configuration, that this site does not admit."""

    code = "bundle"


@cache
def own_bundle() -> dict[str, bytes]:
    """Return the files of this installation's bundle, as Flower builds it: name -> content."""
    return read_bundle(build_bundle(bundle_dir()), None)


def read_bundle(fab: bytes, expected: Mapping[str, bytes] | None) -> dict[str, bytes]:
    """Return the files in a bundle, by name.

    Args:
        fab: the ZIP archive that Flower calls a FAB.
        expected: nothing is unpacked of an archive that has other names or sizes than these files.
    Raises: BundleRefused: it is no archive, or other files are in it.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(fab)) as archive:
            infos = archive.infolist()
            sizes = sorted((info.filename, info.file_size) for info in infos)
            if expected is not None and sizes != sorted((name, len(text)) for name, text in expected.items()):
                names = ", ".join(name for name, _ in sizes[:5]) + (", ..." if len(sizes) > 5 else "")
                raise _refused("the bundle holds other files than ours", names, "other-files")
            return {info.filename: archive.read(info) for info in infos}
    except (zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, EOFError) as error:
        raise _refused("the bundle is not a bundle of Flower's", type(error).__name__, "no-bundle") from error


def check_bundle(fab: bytes) -> None:
    """Check that a bundle is ours, file by file.

    The bytes of the archive are not compared: they depend on the version of zlib that packed them.

    Raises: BundleRefused: it is not.
    """
    expected = own_bundle()
    found = read_bundle(fab, expected)
    if differ := [name for name in expected if found[name] != expected[name]]:
        raise _refused("files of the bundle differ from ours", ", ".join(differ), "changed-files")


def check_overrides(overrides: Mapping[str, object]) -> None:
    """Check that a run's configuration names a run of ours and holds nothing else.

    Raises: BundleRefused: it does not.
    """
    if set(overrides) != {RUN_KEY}:
        raise _refused(
            f"the run's configuration may hold {RUN_KEY!r} alone",
            ", ".join(sorted(overrides)) or "nothing",
            "other-overrides",
        )
    run = overrides[RUN_KEY]
    if not isinstance(run, str) or not _RUN_ID.fullmatch(run):
        raise _refused(f"{RUN_KEY!r} must be 16 hexadecimal digits", repr(run), "no-run-id")


def _refused(rule: str, value: str, kind: str) -> BundleRefused:
    shown = "".join(c if c.isprintable() else "?" for c in value)[:200]  # of the sender's choosing
    return BundleRefused(
        f"{rule} (found: {shown}); install the same version of quorate at the coordinator and here. If the "
        "coordinator's version is the same, then somebody sent code of their own: tell its people.",
        kind=kind,
    )
