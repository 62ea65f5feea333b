"""The federation's model as one plain LoRA adapter, which PEFT and whatever reads PEFT's format can load."""

from __future__ import annotations

import re
import tempfile
from math import sqrt
from pathlib import Path

import numpy as np

from quorate.shared.adapters.adapter import LORA_A, LORA_B, Adapter, lora_layers, saved_modules
from quorate.shared.aggregation.rule import RESIDUAL_A, RESIDUAL_B, GlobalState
from quorate.shared.config.read import dump_yaml
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import AdapterError
from quorate.shared.model.lora_model import lora_config

ADAPTER_DIR, RUN_FILE = "adapter", "run.yaml"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

_WRAPPER = "base_model.model."


def adapter_files(config: RunConfig, state: GlobalState) -> dict[str, bytes]:
    """Return the files of one LoRA adapter that `PeftModel.from_pretrained(base, folder)` loads.

    A residual becomes additional rank of its layer. `run.yaml` goes with it, so that labels and length are
    known to whoever uses it.

    Returns: file name -> content.
    Raises: AdapterError: as `as_lora`.
    """
    settings = config.adapter
    adapter, ranks, alphas = as_lora(state, settings.r, settings.lora_alpha, settings.use_rslora)
    peft_config = lora_config(settings, config.task)
    peft_config.base_model_name_or_path = config.model.model_name_or_path
    peft_config.revision = config.model.revision
    # Full names, not endings: exactly the layers that were adapted, whatever PEFT's defaults become.
    peft_config.target_modules = [layer.removeprefix(_WRAPPER) for layer in lora_layers(adapter)]
    modules = saved_modules(adapter)
    if settings.head is not None and settings.head.hidden_sizes:  # one Sequential, not each of its layers
        modules = sorted({re.sub(r"\.\d+$", "", name) for name in modules})
    peft_config.modules_to_save = modules or None
    peft_config.rank_pattern, peft_config.alpha_pattern = ranks, alphas
    peft_config.inference_mode = True
    with tempfile.TemporaryDirectory() as temporary:
        peft_config.save_pretrained(temporary)
        configuration = (Path(temporary) / CONFIG_FILE).read_bytes()
    return {
        CONFIG_FILE: configuration,
        WEIGHTS_FILE: adapter.to_bytes(),
        RUN_FILE: dump_yaml(config).encode(),
    }


def as_lora(
    state: GlobalState, r: int, lora_alpha: float, use_rslora: bool
) -> tuple[Adapter, dict[str, int], dict[str, float]]:
    """Fold the residual into the factors: A' = [A; residual_A], B' = [B, residual_B].

    A layer with a residual of rank q gets rank r + q, and the alpha with which PEFT's scaling of it
    (alpha' / (r + q), with rsLoRA alpha' / sqrt(r + q)) is that of the other layers.

    Args:
        state: adapter and residual; layer names begin with `base_model.model.`.
        r: rank of the adapter's own factors.
        lora_alpha: scaling numerator of the run.
        use_rslora: whether PEFT scales by 1 / sqrt(rank).
    Returns: the adapter, and `rank_pattern` and `alpha_pattern` for PEFT's LoraConfig, whose keys match the
        layer of that very name and no other. Both are empty where there is no residual.
    Raises: AdapterError: a residual does not fit the adapter's layers or shapes.
    """
    layers = set(lora_layers(state.adapter))
    arrays, ranks, alphas = {}, {}, {}
    for layer in sorted({name.removesuffix(RESIDUAL_A).removesuffix(RESIDUAL_B) for name in state.residual}):
        residual_a, residual_b = (state.residual.get(layer + ending) for ending in (RESIDUAL_A, RESIDUAL_B))
        if layer not in layers or residual_a is None or residual_b is None:
            message = f"residual of layer {layer}: the adapter has no such layer, or a factor is missing."
            raise AdapterError(message, kind="residual-alone")
        a, b = state.adapter[layer + LORA_A], state.adapter[layer + LORA_B]
        q = residual_b.shape[-1]
        expected = (r, r, (q, a.shape[-1]), (b.shape[0], q))
        if (a.shape[0], b.shape[-1], residual_a.shape, residual_b.shape) != expected:
            raise AdapterError(
                f"layer {layer}: A {a.shape}, B {b.shape}, residual_A {residual_a.shape} and residual_B "
                f"{residual_b.shape} do not fit together at rank {r}.",
                kind="residual-shapes",
            )
        arrays[layer + LORA_A] = np.vstack([a, residual_a])
        arrays[layer + LORA_B] = np.hstack([b, residual_b])
        # PEFT reads a key as a regular expression, matched against the end of the name inside the base model.
        key = "^" + re.escape(layer.removeprefix(_WRAPPER))
        ranks[key] = r + q
        alphas[key] = lora_alpha / sqrt(r) * sqrt(r + q) if use_rslora else lora_alpha / r * (r + q)
    return state.adapter.updated(arrays), ranks, alphas
