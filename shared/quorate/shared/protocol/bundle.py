"""Where the bundle lies that Flower carries: `flower-app/`, a pyproject.toml that names our components."""

from __future__ import annotations

from pathlib import Path

from quorate.shared.errors import ConfigError

RUN_KEY = "run"
"""The one key of Flower's run configuration: our run id, 16 hexadecimal digits."""
_FILES = {"pyproject.toml"}


def bundle_dir() -> Path:
    """Return the folder of the bundle, the same in a checkout and in a wheel.

    Flower bundles every Python, TOML, Markdown, YAML and JSON file it finds, so a file more than the one we
    ship would travel to the sites, which would then refuse the bundle.

    Raises: ConfigError: the folder is missing, or holds something else.
    """
    folder = Path(__file__).resolve().parent / "flower-app"
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if found != _FILES:
        extra = ", ".join(sorted(found - _FILES))
        wrong = f"holds files that are not ours ({extra})" if extra else "pyproject.toml is missing"
        raise ConfigError(f"{folder}: {wrong}; install quorate again.")
    return folder
