"""Which Flower bundle and which run configuration a site admits."""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Mapping
from functools import cache

from quorate.client.flower.flower_internals import build_bundle
from quorate.shared.errors import QuorateError
from quorate.shared.protocol.bundle import RUN_KEY, bundle_dir

_RUN_ID = re.compile(r"[0-9a-f]{16}")


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
        found = ", ".join(sorted(overrides)) or "nothing"
        raise _refused(f"the run's configuration may hold {RUN_KEY!r} alone", found, "other-overrides")
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
