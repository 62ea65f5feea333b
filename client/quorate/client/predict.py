"""Try an adapter: what does it say to these texts, or images?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from quorate.shared.config.load import load_run
from quorate.shared.errors import AdapterError
from quorate.shared.model import default_device, load_base
from quorate.shared.tasks.base import Row


def predict(
    adapter_dir: Path, inputs: Sequence[str], *, images: bool = False, batch_size: int = 32
) -> list[dict[str, Any]]:
    """Ask an exported adapter, loaded as PEFT loads it.

    Args:
        adapter_dir: the `adapter/` folder of a run.
        inputs: texts, or paths of images.
        images: whether they are paths of images.
        batch_size: inputs in one forward pass.
    Returns: per input what the task's `predictions` says, such as `label` and `scores`.
    Raises: AdapterError: the folder is not such an adapter, or takes the other kind of input. ModelError: its
        base model cannot be loaded. DataError: an image cannot be opened.
    """
    for name in ("run.yaml", "adapter_config.json", "adapter_model.safetensors"):
        if not (adapter_dir / name).is_file():
            raise AdapterError(f"{adapter_dir} has no {name}; give the adapter/ folder of a finished run.")
    run = load_run(adapter_dir / "run.yaml")
    column = "image" if images else "text"
    if column not in run.task.columns:
        raise AdapterError(f"{adapter_dir} does {run.task.name}, which takes no {column}.")
    base = load_base(run)
    model = PeftModel.from_pretrained(base.model, adapter_dir).eval().to(default_device())
    answers: list[dict[str, Any]] = []
    for start in range(0, len(inputs), batch_size):
        rows = [Row({column: each}, column) for each in inputs[start : start + batch_size]]
        examples = run.task.encode(rows, base.processor, labelled=False)
        batch = run.task.collate(examples, base.processor).to(model.device)
        with torch.inference_mode():
            logits = run.task.forward(model, batch)
        answers.extend(run.task.predictions(logits, batch, base.processor))
    return answers
