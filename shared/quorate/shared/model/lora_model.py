"""The frozen base model with a PEFT LoRA adapter on it.

Weights are safetensors, verified by content hash; remote code is never run. The adapter's start is drawn from
the run's seed, so every site that holds the same base builds the same start without being sent one.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from quorate.shared.adapters.adapter import Adapter, Array
from quorate.shared.adapters.patterns import check_cost
from quorate.shared.aggregation.rule import RESIDUAL_A, RESIDUAL_B
from quorate.shared.config.run_config import AdapterConfig, RunConfig
from quorate.shared.errors import ModelError
from quorate.shared.model.base_model import default_device, load_base, load_empty, placed
from quorate.shared.seeds import derive_seed
from quorate.shared.tasks import Task
from quorate.shared.tasks.task import Example

TRAINABLE = (nn.Linear, nn.Conv2d)
"""Layers that can be trained: those the trainer can stack."""


@dataclass
class LoadedModel:
    """A base with an adapter, ready to train or to evaluate.

    Args:
        peft: PEFT's model, in eval mode; only adapter arrays require gradients.
        processor: the tokenizer (or image processor) that the task's `encode` and `collate` take.
        files: SHA-256 of each file the model was loaded from.
        sha256: of the weights, as in the run file.
        initial: the adapter's seeded start.
    """

    peft: PeftModel
    processor: Any
    files: dict[str, str]
    sha256: str
    initial: Adapter
    _pristine: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _norms: dict[str, float] = field(default_factory=dict, repr=False)
    _residual_hash: str | None = None

    def set_residual(self, residual: Adapter, admit: Callable[[str, float], None] | None = None) -> None:
        """Make the frozen base W0 + s residual_B residual_A, from the untouched W0 each time.

        Args:
            residual: see GlobalState; layers without arrays go back to W0.
            admit: told of each layer and its change, as of `base_change`, before that is made; may raise.
        Raises: ModelError: a layer is not adapted, or its base weight is quantised.
        """
        if residual.content_hash == self._residual_hash:
            return
        self._residual_hash = None  # so that a failure half way is not taken for the residual before it
        modules = dict(self.peft.named_modules())
        for layer, weight in self._pristine.items():
            base_weight(modules[layer]).data.copy_(weight)
        for name, b in residual.items():
            if not name.endswith(RESIDUAL_B):
                continue
            layer = name.removesuffix(RESIDUAL_B)
            module = modules.get(layer)
            if not isinstance(module, LoraLayer) or not isinstance(module, nn.Module):
                raise ModelError(f"the residual names layer {layer}, which this run does not adapt.")
            weight = base_weight(module)
            self._pristine.setdefault(layer, weight.data.clone())
            product = torch.from_numpy(b) @ torch.from_numpy(residual[layer + RESIDUAL_A])
            if admit is not None:
                admit(layer, self._change(layer, product))
            if getattr(module, "fan_in_fan_out", False):
                product = product.T
            weight.data.add_(product.to(weight), alpha=module.scaling["default"])
        self._residual_hash = residual.content_hash

    def base_change(self, layer: str, b: Array, a: Array) -> float:
        """Return how far s b a moves the untouched weight of `layer`, as a Frobenius norm over its own.

        Of the very product that `set_residual` adds: factors can be made whose product is 0 in exact numbers
        and anything in float32.

        Args:
            b: [d_out, q].
            a: [q, d_in].
        Returns: infinity where that is not finite, or the weight is zero.
        Raises: ModelError: as `base_weight`.
        """
        return self._change(layer, torch.from_numpy(b) @ torch.from_numpy(a))

    def _change(self, layer: str, product: Tensor) -> float:
        module = self.peft.get_submodule(layer)
        weight = base_weight(module)
        if layer not in self._norms:
            untouched = self._pristine.get(layer, weight.data)
            self._norms[layer] = float(torch.linalg.vector_norm(untouched.double()))
        scaling: float = module.scaling["default"]  # type: ignore[index, assignment]
        moved = abs(scaling) * float(torch.linalg.vector_norm(product.double()))
        return moved / self._norms[layer] if self._norms[layer] and math.isfinite(moved) else math.inf

    def check_tokens(self, examples: Sequence[Example]) -> None:
        """Raise ModelError if a text has a token for which the model has no embedding."""
        largest = max((max(each.features.get("input_ids", ()), default=0) for each in examples), default=0)
        known = getattr(self.peft.get_input_embeddings(), "num_embeddings", None) if largest else None
        if known is not None and largest >= known:
            raise ModelError(
                f"{self.peft.get_base_model().name_or_path}: the tokenizer gives a text token {largest}, the "
                f"model has embeddings for {known}; they do not belong together: get the model's tokenizer."
            )

    def write_adapter(self, adapter: Adapter) -> None:
        """Put `adapter` into PEFT's own modules."""
        tensors = {name: torch.from_numpy(array.copy()) for name, array in adapter.items()}
        set_peft_model_state_dict(self.peft, tensors)


def base_weight(module: nn.Module) -> nn.Parameter:
    """Return the frozen weight under a LoRA layer.

    Raises: ModelError: the weight is not floating point, so a residual cannot be added exactly.
    """
    weight = module.get_base_layer().weight if isinstance(module, LoraLayer) else None
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        message = "this rule adds to the base weights, which a quantised base cannot take; use fedavg."
        raise ModelError(message)
    return weight


def load_model(run: RunConfig, *, device: torch.device | None = None) -> LoadedModel:
    """Load the run's base model and put a freshly seeded adapter on it.

    Raises: ModelError: as `load_base`, or the model cannot be adapted as asked.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(run.seed, "initial-adapter"))
        base = load_base(run)
        peft = _adapted(base.model, base.drawn, run)
    placed(peft.eval(), run, device or default_device())
    return LoadedModel(peft, base.processor, base.files, base.sha256, adapter_of(peft))


def adapter_schema(run: RunConfig) -> dict[str, tuple[int, ...]]:
    """Return what `load_model(run).initial.schema` would be, without the base model's weights.

    Raises: ModelError: as `load_empty`, or the model cannot be adapted as asked.
    """
    with torch.random.fork_rng(devices=[]):
        peft = _adapted(*load_empty(run), run)
    state = get_peft_model_state_dict(peft)
    return {name: tuple(state[name].shape) for name in sorted(state)}


def _adapted(base: nn.Module, drawn: frozenset[str], run: RunConfig) -> PeftModel:
    """Return the base with the run's adapter, after the checks that need no weights."""
    peft = attach_lora(base, run.adapter, run.task)
    _check_drawn_is_saved(peft, drawn, run)
    if run.training.gradient_checkpointing and not checkpoint_layers(peft):
        raise ModelError(
            f"training.gradient_checkpointing: {type(base).__name__} has no layers that transformers "
            "can checkpoint; set it to false."
        )
    return peft


def attach_lora(base: nn.Module, config: AdapterConfig, task: Task) -> PeftModel:
    """Wrap `base` in PEFT.

    Raises: ModelError: target_modules match nothing, or other layers than TRAINABLE would be trained.
    """
    targets = config.target_modules
    able = [name for name, module in base.named_modules() if isinstance(module, TRAINABLE)]
    _check_all_found("target_modules", targets, base, able)
    _check_all_found("modules_to_save", config.modules_to_save, base, able)
    settings = lora_config(config, task)
    if settings.target_modules is None and (found := task.default_targets(base)) is not None:
        settings.target_modules = found if isinstance(found, str) else list(found)
    if settings.target_modules == "all-linear" and settings.task_type == "TOKEN_CLS":
        # PEFT trains these whole, but leaves them out of all-linear for sequence classification alone.
        settings.exclude_modules = ["classifier", "score"]
    if (head := task.head_modules(base)) is not None:
        settings.modules_to_save = [*head, *(config.modules_to_save or ())]
    try:
        with quiet_about_conv1d():
            peft = get_peft_model(base, settings)
    except ValueError as error:
        why = str(error).splitlines()[0][:200]
        if why.startswith("No modules were targeted"):  # PEFT goes on about settings that a run does not have
            why = "they name the head alone, which is trained whole."
        raise ModelError(
            f"adapter.target_modules {targets!r} cannot be adapted in {type(base).__name__}: {why} "
            f"Layers that can be adapted: {_endings(able)}; name some of them."
        ) from error
    modules = dict(peft.named_modules())
    for name, module in modules.items():
        layer = module.get_base_layer() if isinstance(module, LoraLayer) else None
        if isinstance(layer, nn.Conv2d) and max(layer.dilation) > 1:
            raise ModelError(
                f"{name} is a dilated convolution, for which PEFT's LoRA has no factors of the right shape; "
                "leave it out of adapter.target_modules.",
                kind="dilated",
            )
    for name, parameter in peft.named_parameters():
        owner = modules[name.rpartition(".")[0]]
        can_be = isinstance(owner, TRAINABLE) or "lora_magnitude_vector" in name
        if parameter.requires_grad and not can_be:
            raise ModelError(
                f"{name} ({type(owner).__name__}) would be trained, but only linear layers and convolutions "
                "can be; narrow adapter.target_modules or adapter.modules_to_save."
            )
    return peft


@contextmanager
def quiet_about_conv1d() -> Iterator[None]:
    """Silence PEFT where it finds GPT-2's transposed linear layers, which it adapts rightly all the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
        yield


def checkpoint_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """Return the layers whose activations can be computed again instead of kept."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _check_all_found(
    field: str, wanted: tuple[str, ...] | str | None, base: nn.Module, able: list[str]
) -> None:
    """Raise ModelError for a name that no module ends in; PEFT passes over it when another one matches."""
    names = [name for name, _ in base.named_modules()]
    if isinstance(wanted, str):
        check_cost(f"adapter.{field}", [wanted], names)  # before PEFT matches it on the same names
    if isinstance(wanted, str) and not (
        wanted == "all-linear" or any(re.fullmatch(wanted, name) for name in names)
    ):
        raise ModelError(
            f"adapter.{field}: the regular expression {wanted!r} matches no module's whole name in "
            f"{type(base).__name__}; write name endings as a list, [query, value]. "
            f"Layers that can be adapted: {_endings(able)}."
        )
    for each in wanted if isinstance(wanted, tuple) else ():
        if not any(name == each or name.endswith(f".{each}") for name in names):
            raise ModelError(
                f"adapter.{field}: {type(base).__name__} has no module {each!r}. "
                f"Layers that can be adapted: {_endings(able)}; name some of them."
            )


def _check_drawn_is_saved(peft: PeftModel, drawn: frozenset[str], run: RunConfig) -> None:
    """Raise ModelError for a drawn parameter outside the adapter.

    Who loads the exported adapter would draw another one, and get other answers than the run did.
    """
    base = peft.get_base_model()
    modules = dict(base.named_modules())
    # PEFT renames what it trains whole (it is in the adapter then), and puts LoRA around `base_layer`.
    frozen = {name.replace(".base_layer.", "."): name for name, _ in base.named_parameters()}
    owners = {name.rpartition(".")[0]: frozen[name].rpartition(".")[0] for name in drawn & frozen.keys()}
    if not owners:
        return
    lost = sorted(owners)
    names = ", ".join([*(run.adapter.modules_to_save or ()), *lost])
    trainable = all(isinstance(modules[owner], TRAINABLE) for owner in owners.values())
    remedy = (
        f"train them with it: adapter.modules_to_save: [{names}]"
        if trainable
        else "take a base model that holds them"
    )
    shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
    raise ModelError(
        f"{run.model.model_name_or_path} holds no weights of {shown}, which {type(base).__name__} "
        f"has: they were drawn at random, and nobody who loads the adapter would have them; {remedy}.",
        kind="drawn-at-random",
    )


def _endings(names: list[str]) -> str:
    """List layer names by their last part; those of a Sequential, which are numbers, by their last two."""
    parts = [name.split(".") for name in names]
    return ", ".join(sorted({".".join(p[-2:] if p[-1].isdigit() else p[-1:]) for p in parts}))


def lora_config(config: AdapterConfig, task: Task) -> LoraConfig:
    """Return PEFT's configuration for the run's adapter; it names no base model yet."""
    targets = config.target_modules
    return LoraConfig(
        task_type=task.peft_task_type,
        r=config.r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT only divides by it
        lora_dropout=config.lora_dropout,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        modules_to_save=None if config.modules_to_save is None else list(config.modules_to_save),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )


def adapter_of(peft: PeftModel) -> Adapter:
    """Return a copy of the adapter's arrays, named as PEFT saves them."""
    state = get_peft_model_state_dict(peft)
    return Adapter({name: tensor.detach().float().cpu().numpy().copy() for name, tensor in state.items()})
