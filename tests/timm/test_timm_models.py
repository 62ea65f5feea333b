"""VGG, which transformers has through timm alone: adapted, trained, exported, loaded by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_images as small
import torch

timm = pytest.importorskip("timm", reason="timm is not installed here; `make test-timm` has an environment")

from peft import PeftModel  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from quorate.client.trainer.fit import SiteTask, fit  # noqa: E402
from quorate.client.trainer.stack import AdapterStack  # noqa: E402
from quorate.shared.adapters.adapter import Adapter, lora_layers, saved_modules  # noqa: E402
from quorate.shared.model.lora_model import LoadedModel, load_model  # noqa: E402
from quorate.shared.progress import ignore_step  # noqa: E402
from quorate.simulations.runner import simulate  # noqa: E402


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VGG-11 with a narrow neck (9 million weights instead of 129), random, as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("vgg")
    figures = {"input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    config = TimmWrapperConfig(
        architecture="vgg11", num_labels=5, model_args={"mlp_ratio": 0.02}, pretrained_cfg=figures
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        TimmWrapperForImageClassification(config).save_pretrained(folder)
    return folder


def run_of(vgg: Path, **sections: Any) -> Any:
    return small.make_run(vgg, **sections)


def test_convolutions_are_adapted_and_the_head_is_trained(vgg: Path) -> None:
    model = load_model(run_of(vgg))
    assert saved_modules(model.initial) == ["timm_model.head.fc"]
    adapted = [name for name in lora_layers(model.initial) if "features" in name]
    assert len(adapted) == 8, "VGG-11 has 8 convolutions before its neck"
    assert model.processor.size == {"height": 32, "width": 32}


def examples_of(run: Any, model: LoadedModel, folder: Path, count: int, seed: int) -> Any:
    return run.task.encode(small.make_rows(folder, count, seed), model.processor)


def test_the_loss_falls(vgg: Path, tmp_path: Path) -> None:
    training = {"max_steps": 30, "per_device_train_batch_size": 6, "lr_scheduler_type": "constant"}
    run = run_of(vgg, training={**training, "learning_rate": 1e-3})
    model = load_model(run)
    losses: list[float] = []
    task = SiteTask("north", examples_of(run, model, tmp_path, 12, 0), model.initial)
    stack = AdapterStack.install(model)
    fit(stack, run, 1, [task], frozenset(model.initial), lambda event: losses.append(event.loss))
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_stacked_sites_are_sites_alone(vgg: Path, tmp_path: Path) -> None:
    run = run_of(vgg, training={"max_steps": 2, "adam_epsilon": 1e-5})
    model = load_model(run)
    stack = AdapterStack.install(model)
    sites = [
        SiteTask(name, examples_of(run, model, tmp_path, count, count), model.initial)
        for name, count in (("north", 9), ("south", 3))
    ]
    names = frozenset(model.initial)
    together = fit(stack, run, 1, sites, names, ignore_step)
    for site, fitted in zip(sites, together, strict=True):
        (alone,) = fit(stack, run, 1, [site], names, ignore_step)
        moved = [np.abs(fitted.adapter[name] - site.start[name]).max() for name in names]
        assert max(moved) > 1e-3, "nothing was trained"
        assert max(np.abs(alone.adapter[n] - fitted.adapter[n]).max() for n in names) < 1e-5


def test_peft_loads_the_export(vgg: Path, tmp_path: Path) -> None:
    run = run_of(vgg, federation={"rounds": 1})
    rows = small.make_rows(tmp_path / "images", 8, 0)
    simulate(run, {"north": {"train": rows, "validation": rows, "test": rows}}, tmp_path / "run")
    folder = tmp_path / "run" / "adapter"
    base = AutoModelForImageClassification.from_pretrained(vgg, num_labels=3, ignore_mismatched_sizes=True)
    theirs = PeftModel.from_pretrained(base, folder).eval()
    model = load_model(run)
    stack = AdapterStack.install(model)
    stack.load([Adapter.from_bytes((folder / "adapter_model.safetensors").read_bytes())], ())
    batch = run.task.collate(run.task.encode(rows, model.processor), model.processor)
    with torch.no_grad():
        torch.testing.assert_close(
            model.peft(**batch.inputs).logits, theirs(**batch.inputs).logits, rtol=0, atol=1e-5
        )
