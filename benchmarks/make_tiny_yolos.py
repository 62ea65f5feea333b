"""Make a small YOLOS with random weights, for the recipe bccd_detection where no pretrained one can be had.

    python benchmarks/make_tiny_yolos.py FOLDER [--image-size 96 128] [--hidden-size 64] [--seed 0]

The folder holds a model and an image processor as `save_pretrained` writes them. A run freezes what it does
not adapt, so what a real checkpoint has learnt must at least be drawn here: position embeddings and detection
tokens, which transformers starts at zero, where every detection token would forever say the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import YolosConfig, YolosForObjectDetection
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil


def make(
    folder: Path,
    image_size: tuple[int, int] = (96, 128),
    hidden_size: int = 64,
    layers: int = 3,
    heads: int = 4,
    queries: int = 30,
    patch_size: int = 16,
    seed: int = 0,
) -> None:
    """Write the model; `image_size` is height and width, multiples of `patch_size`."""
    config = YolosConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * hidden_size,
        image_size=list(image_size),
        patch_size=patch_size,
        num_detection_tokens=queries,
        use_mid_position_embeddings=False,
        num_labels=1,
        layer_norm_eps=1e-6,
        initializer_range=0.5 * hidden_size**-0.5,
    )
    torch.manual_seed(seed)
    model = YolosForObjectDetection(config)
    embeddings = model.vit.embeddings
    with torch.no_grad():
        for parameter in (embeddings.cls_token, embeddings.detection_tokens):
            parameter.normal_(std=1.0)
        embeddings.position_embeddings.normal_(std=0.1)
        count = 1 + (image_size[0] // patch_size) * (image_size[1] // patch_size)
        embeddings.position_embeddings[:, 1:count] = _places(image_size, patch_size, hidden_size)
    model.save_pretrained(folder)
    YolosImageProcessorPil().save_pretrained(folder)


def _places(image_size: tuple[int, int], patch_size: int, width: int) -> torch.Tensor:
    """Return sines and cosines of each patch's row and column, [patches, width], as DETR has them."""
    rows, columns = (side // patch_size for side in image_size)
    frequencies = 2 * torch.pi * torch.logspace(-1, 2, width // 4, base=2)
    y = torch.linspace(0, 1, rows)[:, None] * frequencies
    x = torch.linspace(0, 1, columns)[:, None] * frequencies
    parts = [
        torch.cat([y.sin(), y.cos()], dim=1)[:, None].expand(rows, columns, -1),
        torch.cat([x.sin(), x.cos()], dim=1)[None].expand(rows, columns, -1),
    ]
    return torch.cat(parts, dim=-1).flatten(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--image-size", type=int, nargs=2, default=(96, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--queries", type=int, default=30)
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    make(
        given.folder,
        tuple(given.image_size),
        given.hidden_size,
        given.layers,
        queries=given.queries,
        patch_size=given.patch_size,
        seed=given.seed,
    )
    print(f"wrote {given.folder}")


if __name__ == "__main__":
    main()
