"""A base model in 4 or 8 bits, through bitsandbytes (QLoRA, arXiv:2305.14314; LLM.int8(), arXiv:2208.07339).

The adapter stays in float32, and so do the weights that bitsandbytes leaves alone (embeddings, norms, head).
Needs an NVIDIA GPU. What this file refuses is tested; the path on a GPU was not run when it was written.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import nn

from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ModelError

M = TypeVar("M", bound=nn.Module)


def quantised_kwargs(run: RunConfig) -> dict[str, Any]:
    """Return keyword arguments for `from_pretrained`; none for a base in full precision.

    Raises: ModelError: there is no GPU, or no bitsandbytes.
    """
    if not run.model.quantised:
        return {}
    field = "model.load_in_4bit" if run.model.load_in_4bit else "model.load_in_8bit"
    if not torch.cuda.is_available():
        raise ModelError(f"{field} needs an NVIDIA GPU, and this machine shows none; leave it out here.")
    if find_spec("bitsandbytes") is None:
        raise ModelError(f"{field} needs bitsandbytes; pip install 'quorate[quant]', or leave it out.")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=run.model.load_in_4bit,
        load_in_8bit=run.model.load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16 if run.training.bf16 else torch.float32,
    )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}


def placed(model: M, run: RunConfig, device: torch.device) -> M:
    """Return the model on `device`; a quantised one is where it was loaded, and cannot be moved."""
    return model if run.model.quantised else model.to(device)
