"""Environment variables of the libraries under us, set before any of them is imported."""

from __future__ import annotations

import os

_ALWAYS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_UNLESS_SET = {"TOKENIZERS_PARALLELISM": "false"}


def prepare_environment() -> None:
    """Switch off telemetry, update checks and installing at run time, whatever the environment says."""
    os.environ.update(_ALWAYS)
    for name, value in _UNLESS_SET.items():
        os.environ.setdefault(name, value)
