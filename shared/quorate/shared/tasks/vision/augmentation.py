"""Random changes to training images: geometry and colour, drawn apart from being applied.

What is drawn is a value, so that boxes can be moved as their image was, and an image's change depends on the
generator it was drawn from alone. Why torch's operations and no library: docs/decisions/020.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, radians, sin
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from quorate.shared.config.config_model import ConfigModel

Share = Annotated[float, Field(ge=0, le=1)]
# Weights of red, green and blue in grey (ITU-R BT.601), as Pillow has them.
_GREY = (0.299, 0.587, 0.114)


class Augmentation(ConfigModel):
    """Random changes to training images, drawn anew each time an image is seen; none unless asked for."""

    horizontal_flip: Share = 0.0
    """Probability that left and right change places."""
    vertical_flip: Share = 0.0
    """Probability that top and bottom change places."""
    rotation: float = Field(0.0, ge=0, le=180)
    """Turn by an angle of up to this, either way [degrees]."""
    scale: tuple[Annotated[float, Field(gt=0, le=10)], Annotated[float, Field(gt=0, le=10)]] = (1.0, 1.0)
    """Enlarge by a factor from this range; above 1 the image is cropped, below 1 it gets a border."""
    translation: Share = 0.0
    """Shift by up to this share of width and of height, either way."""
    padding_mode: Literal["reflection", "border", "zeros"] = "reflection"
    """What lies beyond the image's edge: its mirror image, its outermost pixels, or black."""
    brightness: Share = 0.0
    """Change brightness by up to this share, either way."""
    contrast: Share = 0.0
    """Change contrast by up to this share, either way."""
    saturation: Share = 0.0
    """Change the strength of colours by up to this share, either way."""

    @model_validator(mode="after")
    def _scale_in_order(self) -> Self:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale {list(self.scale)} is no range; put the smaller factor first")
        return self

    @property
    def changes(self) -> bool:
        """Whether anything is changed at all."""
        return self != type(self)(padding_mode=self.padding_mode)

    def draw(self, generator: np.random.Generator) -> Change:
        """Draw one image's change.

        Every figure is drawn, asked for or not, so that switching one on leaves the others as they were.
        """
        flips = generator.random(2) < (self.horizontal_flip, self.vertical_flip)
        angle = radians(self.rotation) * generator.uniform(-1, 1)
        factor = generator.uniform(*self.scale)
        shift = self.translation * generator.uniform(-1, 1, size=2)
        colour = 1 + generator.uniform(-1, 1, size=3) * (self.brightness, self.contrast, self.saturation)
        turn = np.array([[cos(angle), -sin(angle)], [sin(angle), cos(angle)]])
        return Change(
            factor * turn @ np.diag(1.0 - 2 * flips), shift, tuple(colour.tolist()), self.padding_mode
        )


@dataclass(frozen=True)
class Change:
    """One image's change: a point p becomes linear (p - middle) + middle + shift.

    Args:
        linear: [2, 2], on pixels (x to the right, y down).
        shift: (x, y) in shares of width and height.
        colour: factors of brightness, contrast and saturation.
        padding_mode: see Augmentation.
    """

    linear: npt.NDArray[np.float64]
    shift: npt.NDArray[np.float64]
    colour: tuple[float, ...]
    padding_mode: str = "reflection"

    def image(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return the changed image, [3, height, width], of the same size."""
        pixels = self._coloured(self._moved(torch.from_numpy(image).float()[None]))
        changed: npt.NDArray[np.uint8] = pixels[0].round().clamp(0, 255).byte().numpy()
        return changed

    def boxes(
        self, boxes: npt.NDArray[Any], height: int, width: int
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Move boxes as `image` moves pixels.

        Args:
            boxes: (x, y, width, height) each, [n, 4], in pixels from the top left corner.
            height, width: of the image [pixels].
        Returns: the upright boxes around the moved ones, cut to the image, [n, 4]; and which share of each is
            left in it, [n]: 0 for a box that has left the image, to be dropped.
        """
        low, size = np.asarray(boxes, dtype=np.float64).reshape(-1, 4).reshape(-1, 2, 2).transpose(1, 0, 2)
        frame = np.array([width, height], dtype=np.float64)
        units = np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
        corners = low[:, None] + units * size[:, None]
        moved = (corners - frame / 2) @ self.linear.T + frame / 2 + self.shift * frame
        start, end = moved.min(axis=1), moved.max(axis=1)
        cut_start, cut_end = start.clip(0, frame), end.clip(0, frame)
        whole = np.maximum((end - start).prod(axis=1), np.finfo(np.float64).tiny)
        return np.hstack([cut_start, cut_end - cut_start]), (cut_end - cut_start).prod(axis=1) / whole

    def _moved(self, pixels: Tensor) -> Tensor:
        if np.array_equal(self.linear, np.eye(2)) and not self.shift.any():
            return pixels
        # grid_sample asks where a pixel comes from, in units of half the image from its middle.
        half = np.array([pixels.shape[3], pixels.shape[2]]) / 2
        back = np.linalg.inv(self.linear) * half / half[:, None]
        theta = torch.tensor(np.column_stack([back, -back @ (2 * self.shift)]), dtype=torch.float32)
        grid = functional.affine_grid(theta[None], list(pixels.shape), align_corners=False)
        return functional.grid_sample(pixels, grid, "bilinear", self.padding_mode, align_corners=False)

    def _coloured(self, pixels: Tensor) -> Tensor:
        brightness, contrast, saturation = self.colour
        grey = torch.tensor(_GREY)[None, :, None, None]
        if brightness != 1:
            pixels = (pixels * brightness).clamp(0, 255)
        if contrast != 1:
            mean = (pixels * grey).sum(dim=1).mean()
            pixels = (mean + (pixels - mean) * contrast).clamp(0, 255)
        if saturation != 1:
            plain = (pixels * grey).sum(dim=1, keepdim=True)
            pixels = (plain + (pixels - plain) * saturation).clamp(0, 255)
        return pixels
