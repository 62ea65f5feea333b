"""What a model's files must be before anything else looks at them: whole, safe to read, and numbers.

The libraries that load a model stumble over damaged files in ways of their own; here the file is named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from quorate.shared.errors import ModelError


def weights_sha256(files: dict[str, str], folder: Path) -> str:
    """Return the hash a run file pins: of the one weights file, or of the list of several.

    Raises: ModelError: there are no safetensors weights.
    """
    weights = {name: digest for name, digest in files.items() if name.endswith(".safetensors")}
    if not weights:
        raise ModelError(
            f"{folder} holds no .safetensors weights; convert the model with save_pretrained "
            "(other formats can run code when they are loaded, so they are not read)."
        )
    if len(weights) == 1:
        return next(iter(weights.values()))
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(weights.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def check_files(folder: Path, files: Collection[str]) -> None:
    """Raise ModelError where the configuration is missing or a weights file is cut off."""
    if "config.json" not in files:
        raise ModelError(f"{folder} holds no config.json; name a folder made by save_pretrained.")
    for name in files:
        if name.endswith(".safetensors"):
            try:
                with safe_open(folder / name, framework="np"):
                    pass
            except SafetensorError as error:
                message = f"{folder / name} is not a whole safetensors file ({error}); get it again."
                raise ModelError(message) from error


def check_finite(folder: Path, model: nn.Module) -> None:
    """Raise ModelError for a weight that is NaN or infinite: training would only seem to diverge."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            message = f"{folder}: the weights of {name} hold NaN or infinity; get the model again."
            raise ModelError(message, kind="weights-not-finite")


def in_brief(error: Exception) -> str:
    """Return the kind of another library's error and its first line."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300].rstrip('.:')}"
