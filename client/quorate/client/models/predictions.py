"""Try an adapter: what does it say to these texts, or images?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict

from quorate.shared.adapters.adapter import Adapter
from quorate.shared.adapters.peft_export import CONFIG_FILE, RUN_FILE, WEIGHTS_FILE
from quorate.shared.config.load import load_run
from quorate.shared.errors import AdapterError
from quorate.shared.model.base_model import Base, default_device, load_base, placed
from quorate.shared.model.lora_model import quiet_about_conv1d
from quorate.shared.tasks.task import Row


def predict(
    adapter_dir: Path, inputs: Sequence[str], *, images: bool = False, batch_size: int = 32
) -> list[dict[str, Any]]:
    """Ask an exported adapter, loaded as PEFT loads it.

    Args:
        adapter_dir: the `adapter/` folder of a run.
        inputs: texts, prompts, or paths of images.
        images: whether they are paths of images.
    Returns: per input what the task's `predictions` says, such as `label` and `scores`, `entities`, or
        `completion`.
    Raises: AdapterError: the folder is not such an adapter, or takes the other kind of input. ModelError: its
        base model cannot be loaded. DataError: an image cannot be opened.
    """
    check_adapter_dir(adapter_dir)
    run = load_run(adapter_dir / RUN_FILE)
    column = "image" if images else "text"
    if images != ("image" in run.task.columns):
        message = f"{adapter_dir} does {run.task.name}, which takes no {column}."
        raise AdapterError(message, kind="other-input")
    base = load_base(run)
    model = placed(with_adapter(base, adapter_dir).eval(), run, default_device())
    answers: list[dict[str, Any]] = []
    for start in range(0, len(inputs), batch_size):
        rows = [Row({column: each}, column) for each in inputs[start : start + batch_size]]
        examples = run.task.encode(rows, base.processor, labelled=False)
        batch = run.task.collate(examples, base.processor).to(model.device)
        with torch.inference_mode():
            logits = run.task.forward(model, batch)
        answers.extend(run.task.predictions(logits, batch, base.processor))
    return answers


def check_adapter_dir(adapter_dir: Path) -> None:
    """Raise AdapterError where a file of an exported adapter is missing."""
    for name in (RUN_FILE, CONFIG_FILE, WEIGHTS_FILE):
        if not (adapter_dir / name).is_file():
            raise AdapterError(f"{adapter_dir} has no {name}; give the adapter/ folder of a finished run.")


def with_adapter(base: Base, adapter_dir: Path) -> PeftModel:
    """Load the adapter as PEFT does.

    Raises: AdapterError: a file is damaged, or is not of this base and this run.
    """
    remedy = "restore the folder from a copy, or write it again: quorate simulate RUN --resume"
    weights = adapter_dir / WEIGHTS_FILE
    try:
        stored = Adapter.from_bytes(weights.read_bytes())
        stored.check_finite()
        with warnings.catch_warnings(), quiet_about_conv1d():
            # PEFT only warns of names that it does not find, and passes over others.
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            model = PeftModel.from_pretrained(base.model, adapter_dir)
        taken = get_peft_model_state_dict(model, save_embedding_layers=False)
        stored.check_schema({name: tuple(tensor.shape) for name, tensor in taken.items()})
    except AdapterError as error:
        raise AdapterError(f"{weights}: {str(error).rstrip('.')}; {remedy}.") from error
    except Exception as error:  # PEFT raises whatever a damaged file makes it stumble over
        raise AdapterError(
            f"{adapter_dir}: {CONFIG_FILE} and {weights.name} do not make an adapter for this base "
            f"({type(error).__name__}); {remedy}."
        ) from error
    return model
