"""Try an adapter: what does it say to these texts?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from quorate.shared.config.load import load_run
from quorate.shared.errors import AdapterError
from quorate.shared.model import default_device, load_base, quiet_about_conv1d
from quorate.shared.quantised import placed
from quorate.shared.tasks.base import Row


def predict(adapter_dir: Path, texts: Sequence[str], *, batch_size: int = 32) -> list[dict[str, Any]]:
    """Classify texts, or answer prompts, with an exported adapter, loaded as PEFT loads it.

    Args:
        adapter_dir: the `adapter/` folder of a run.
        texts: what to classify or to answer.
        batch_size: texts in one forward pass.
    Returns: per text what the task's `predictions` says, such as `label` and `scores`, or `completion`.
    Raises: AdapterError: the folder is not such an adapter. ModelError: its base model cannot be loaded.
    """
    for name in ("run.yaml", "adapter_config.json", "adapter_model.safetensors"):
        if not (adapter_dir / name).is_file():
            raise AdapterError(f"{adapter_dir} has no {name}; give the adapter/ folder of a finished run.")
    run = load_run(adapter_dir / "run.yaml")
    base = load_base(run)
    with quiet_about_conv1d():
        adapted = PeftModel.from_pretrained(base.model, adapter_dir)
    model = placed(adapted.eval(), run, default_device())
    answers: list[dict[str, Any]] = []
    for start in range(0, len(texts), batch_size):
        rows = [Row({"text": text}, "text") for text in texts[start : start + batch_size]]
        examples = run.task.encode(rows, base.processor, labelled=False)
        batch = run.task.collate(examples, base.processor).to(model.device)
        with torch.inference_mode():
            logits = run.task.forward(model, batch)
        answers.extend(run.task.predictions(logits, batch, base.processor))
    return answers
