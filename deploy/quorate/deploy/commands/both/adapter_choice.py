"""Finding the adapter that a command is about."""

from __future__ import annotations

from pathlib import Path

from quorate.shared.errors import AdapterError
from quorate.shared.process.files import restore_folder


def adapter_folder(folder: Path) -> Path:
    """Return the adapter folder that is meant: this one, or the one in a run's output folder.

    Raises: AdapterError: neither is one. OutputError: a kill left it under another name,
        which cannot be changed.
    """
    for candidate in (folder, folder / "adapter"):
        restore_folder(candidate)
        if (candidate / "adapter_config.json").is_file():
            return candidate
    raise AdapterError(
        f"{folder}: holds no adapter (no adapter_config.json); name the adapter folder of a run."
    )
