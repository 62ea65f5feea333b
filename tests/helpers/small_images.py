"""Small real image models with random weights, images that show their label, and runs over both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from quorate.shared.config.run_config import RunConfig
from quorate.shared.tasks.task import Row

SIZE = 32
LABELS = ("dark", "left", "right")
_CONFIGS: dict[str, dict[str, Any]] = {
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "ViT": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": SIZE,
        "patch_size": 8,
    },
    "ConvNext": {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]},
    "MobileNetV1": {"depth_multiplier": 0.125, "image_size": SIZE},
    "MobileNetV2": {"depth_multiplier": 0.125, "image_size": SIZE},
}
ARCHITECTURES = tuple(_CONFIGS)


def save_model(folder: Path, architecture: str = "ResNet") -> Path:
    """Write a model and its image processor; BatchNorm has seen data, so that its statistics are some."""
    config = getattr(transformers, f"{architecture}Config")(**_CONFIGS[architecture])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{architecture}ForImageClassification")(config)
        model.train()
        with torch.no_grad():
            model(pixel_values=torch.randn(8, 3, SIZE, SIZE))
    model.save_pretrained(folder)
    transformers.ViTImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]
    ).save_pretrained(folder)
    return folder


def make_run(model: Path, **sections: Any) -> RunConfig:
    """A run over `model`; keyword arguments are merged into its sections."""
    base: dict[str, Any] = {
        "name": "test",
        "seed": 3,
        "task": {"name": "image_classification", "labels": LABELS},
        "data": "images",
        "model": {"model_name_or_path": str(model)},
        "adapter": {"r": 4, "lora_alpha": 8},
        "training": {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2},
        "federation": {"rounds": 2, "grace_seconds": 0},
        "evaluation": {"bootstrap_samples": 0},
    }
    for name, section in sections.items():
        base[name] = {**base[name], **section}
    return RunConfig.model_validate(base)


def make_rows(folder: Path, count: int, seed: int) -> list[Row]:
    """Noisy images, oblong, whose bright half is the label."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        label = int(draw.integers(3))
        pixels = draw.integers(0, 90, (36, 48, 3))
        if label:
            half = slice(0, 24) if label == 1 else slice(24, 48)
            pixels[:, half] += 150
        path = folder / f"{seed}-{index}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        rows.append(Row({"image": str(path), "label": label}, str(path)))
    return rows
