"""The frozen base model as its files have it: found, verified by content hash, loaded with the task's head.

Weights are safetensors; remote code is never run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import nn

from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ModelError
from quorate.shared.model.heads import build_head
from quorate.shared.model.sources import resolve_model
from quorate.shared.model.weights import check_files, check_finite, in_brief, weights_sha256

_FILES = (
    "*.safetensors",
    "config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "*.model",
    "preprocessor_config.json",
    "chat_template*",
)
M = TypeVar("M", bound=nn.Module)
_PROCESSORS = {"AutoTokenizer": "tokenizer", "AutoImageProcessor": "image processor"}


@dataclass
class Base:
    """A verified base model with the task's head, not yet adapted.

    Args:
        model: in float32, in eval mode.
        processor: the tokenizer (or image processor) that the task's `encode` and `collate` take.
        files: SHA-256 of each file the model was loaded from.
        sha256: of the weights, as in the run file.
        drawn: names of the parameters that the files do not hold, such as the task's head.
    """

    model: Any
    processor: Any
    files: dict[str, str]
    sha256: str
    drawn: frozenset[str]


def load_base(run: RunConfig) -> Base:
    """Find, verify and load the run's base model; a head it lacks is drawn from torch's global generator.

    Raises: ModelError: the model is not there, or is not what the run file says.
    """
    folder = resolve_model(run.model.model_name_or_path, run.model.revision)
    files, sha256 = whole_files(folder)
    if run.model.sha256 not in (None, sha256):
        raise ModelError(
            f"{run.model.model_name_or_path}: weights have sha256 {sha256}, the run file says "
            f"{run.model.sha256}; get the right model or correct model.sha256.",
            kind="other-weights",
        )
    model, drawn = _read(folder, run, **quantised_kwargs(run))
    check_finite(folder, model)
    return Base(model, _load_processor(folder, run, model), files, sha256, drawn)


def load_empty(run: RunConfig) -> tuple[nn.Module, frozenset[str]]:
    """Return the run's base model without values (on torch's meta device, never quantised), and `Base.drawn`.

    It costs neither time nor memory, whatever the model's size. Its files' hashes are not looked at.

    Raises: ModelError: there is no model, or it cannot be loaded.
    """
    return _read(resolve_model(run.model.model_name_or_path, run.model.revision), run, device_map="meta")


def load_tokenizer(run: RunConfig) -> Any:
    """Return the processor of the run's base model alone, without its weights.

    Raises: ModelError: there is no model, or it has none.
    """
    return _load_auto_processor(resolve_model(run.model.model_name_or_path, run.model.revision), run)


def default_device() -> torch.device:
    """Return the first GPU that CUDA_VISIBLE_DEVICES leaves us, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that decides what the model computes."""
    names = sorted({path.name for pattern in _FILES for path in folder.glob(pattern) if path.is_file()})
    hashes = {}
    for name in names:
        with (folder / name).open("rb") as stream:
            hashes[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def whole_files(folder: Path) -> tuple[dict[str, str], str]:
    """Return `hash_files`, and the hash of the weights among them as a run file names it.

    Raises: ModelError: a file is missing or cut off.
    """
    files = hash_files(folder)
    sha256 = weights_sha256(files, folder)
    check_files(folder, files)
    return files, sha256


def _read(folder: Path, run: RunConfig, **where: Any) -> tuple[nn.Module, frozenset[str]]:
    """Return the model with the run's head, and the names of parameters that the files do not hold.

    `where` says in what form and where to, as `from_pretrained` takes it.
    """
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its report of a new head is news to nobody here
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    task = run.task
    auto = getattr(transformers, task.auto_class)
    try:
        model, loading = auto.from_pretrained(
            folder,
            output_loading_info=True,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # a checkpoint's own head gives way to the run's
            **task.model_kwargs(),
            **task.kwargs_for(transformers.PretrainedConfig.get_config_dict(folder)[0]),
            **where,
        )
    except Exception as error:  # whatever transformers stumbles over in files that it does not expect
        raise ModelError(
            f"{folder} cannot be loaded as {task.auto_class}: {in_brief(error)}; get the model's files "
            "again, or name a model that has this head."
        ) from error
    assert isinstance(model, nn.Module)
    if run.adapter.head is not None and run.adapter.head.hidden_sizes:
        build_head(model, run.adapter.head, task)
    mismatched = {name for name, *_shapes in loading["mismatched_keys"]}
    return model, frozenset(mismatched | set(loading["missing_keys"]))


def _load_processor(folder: Path, run: RunConfig, base: Any) -> Any:
    processor = _load_auto_processor(folder, run)
    return run.task.prepare_processor(processor, base, run.model.pad_token, str(folder))


def _load_auto_processor(folder: Path, run: RunConfig) -> Any:
    auto = getattr(transformers, run.task.processor_class)
    try:
        return auto.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # as above
        kind = _PROCESSORS.get(run.task.processor_class, "processor")
        message = f"{folder} has no usable {kind}: {in_brief(error)}; get the {kind}'s files again."
        raise ModelError(message) from error


def quantised_kwargs(run: RunConfig) -> dict[str, Any]:
    """Return keyword arguments for `from_pretrained`; none for a base in full precision.

    In 4 or 8 bits through bitsandbytes (QLoRA, arXiv:2305.14314; LLM.int8(), arXiv:2208.07339) the adapter
    stays in float32, and so do the weights that bitsandbytes leaves alone (embeddings, norms, head). What is
    refused here is tested; the path on a GPU was not run when it was written.

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
