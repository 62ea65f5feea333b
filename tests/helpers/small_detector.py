"""A small YOLOS with random weights, and images of coloured rectangles with boxes around them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from quorate.shared.tasks.task import Row


def save_model(folder: Path) -> Path:
    """Write a model for images of 32 by 48 pixels, and its image processor."""
    from transformers import YolosConfig, YolosForObjectDetection
    from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=[32, 48],
        patch_size=8,
        num_detection_tokens=7,
        use_mid_position_embeddings=False,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = YolosForObjectDetection(config)
        with torch.no_grad():
            for parameter in (
                model.vit.embeddings.detection_tokens,
                model.vit.embeddings.position_embeddings,
            ):
                parameter.normal_()
    model.save_pretrained(folder)
    YolosImageProcessorPil().save_pretrained(folder)
    return folder
    return folder


def make_rows(folder: Path, count: int, seed: int) -> list[Row]:
    """Images with 0 to 4 bright rectangles, and boxes around them."""
    draw = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    rows = []
    for index in range(count):
        image = Image.new("RGB", (60, 40))
        objects = []
        for _ in range(index % 5):
            label, x, y = int(draw.integers(3)), int(draw.integers(40)), int(draw.integers(25))
            width, height = int(draw.integers(6, 20)), int(draw.integers(5, 15))
            colour = [0, 0, 0]
            colour[label] = 255
            ImageDraw.Draw(image).rectangle((x, y, x + width - 1, y + height - 1), tuple(colour))
            objects.append((label, float(x), float(y), float(width), float(height)))
        path = folder / f"{seed}-{index}.png"
        image.save(path)
        rows.append(Row({"image": str(path), "objects": objects}, f"rows-{seed}:{index + 1}"))
    return rows
