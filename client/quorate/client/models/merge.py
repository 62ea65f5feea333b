"""Base model and adapter as one model, which transformers loads without PEFT."""

from __future__ import annotations

import shutil
from pathlib import Path

from quorate.client.models.predictions import check_adapter_dir, with_adapter
from quorate.shared.adapters.peft_export import RUN_FILE
from quorate.shared.config.load import load_run
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ModelError, OutputError
from quorate.shared.model.base_model import hash_files, load_base
from quorate.shared.model.weights import weights_sha256
from quorate.shared.process.files import put_folder, unfinished

_CARD = """\
# {name}: base model and adapter in one

Made by `quorate export --merge` from the adapter of run `{name}` (`run.yaml` lies here too).
Base model: `{base}`, weights sha256 {sha256}; its licence holds for this model as well.
Load it with `transformers.{auto_class}.from_pretrained`; PEFT is not needed.
"""


def merge(adapter_dir: Path, folder: Path) -> str:
    """Write base and adapter as one model to `folder`, whole or not at all, with its tokenizer.

    Args:
        adapter_dir: the `adapter/` folder of a run.
        folder: a new or empty folder.
    Returns: SHA-256 of the merged weights, as a run file would name it.
    Raises: AdapterError: the folder is not such an adapter. ModelError: the base is not there or not the one
        that the adapter was trained on, or the two do not merge. OutputError: `folder` is in use.
    """
    check_adapter_dir(adapter_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        message = f"{folder} is there already and not an empty folder; choose another one with -o."
        raise OutputError(message, kind="folder-in-use")
    run = load_run(adapter_dir / RUN_FILE)
    _check_merges(run, adapter_dir)
    base = load_base(run)
    merged = with_adapter(base, adapter_dir).merge_and_unload()
    card = _CARD.format(
        name=run.name, base=run.model.model_name_or_path, sha256=base.sha256, auto_class=run.task.auto_class
    )
    with unfinished(folder) as temporary:
        merged.save_pretrained(temporary)
        base.processor.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        shutil.copyfile(adapter_dir / RUN_FILE, temporary / RUN_FILE)
        put_folder(temporary, folder)
    return weights_sha256(hash_files(folder), folder)


def _check_merges(run: RunConfig, adapter_dir: Path) -> None:
    """Raise ModelError for what one plain model cannot hold."""
    if run.model.quantised:
        raise ModelError(
            f"{adapter_dir}: the run's base is held in {'4' if run.model.load_in_4bit else '8'} bits, and an "
            "adapter merged into such weights would be rounded away; use the adapter with PEFT instead.",
            kind="quantised-base",
        )
    if run.adapter.head is not None and run.adapter.head.hidden_sizes:
        raise ModelError(
            f"{adapter_dir}: the run has a head of several layers (adapter.head), for which "
            f"{run.task.auto_class} has no place; use the adapter with PEFT instead.",
            kind="own-head",
        )
