"""What tasks on images have in common: opening, resizing, random changes in training, normalising."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn

from quorate.shared.errors import DataError, ModelError
from quorate.shared.tasks.task import Batch, Example, Kind, Row, TargetTask
from quorate.shared.tasks.vision.augmentation import Augmentation

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
"""Endings of files that are taken for images in a folder of them."""
# No others: some of Pillow's formats start programs (EPS) or read what nobody means by an image.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
_ADVICE = "correct the row, replace the file, or remove the row."
# Their TensorFlow padding asks a convolution for its stride, which one that PEFT has wrapped does not tell.
_TF_PADDED = ("mobilenet_v1", "mobilenet_v2")

Resize = Literal["stretch", "crop", "pad"]


class ImageTask(TargetTask):
    """A task whose input is one image a row; a class beside it says what is learnt from it."""

    processor_class: ClassVar[str] = "AutoImageProcessor"
    peft_task_type: ClassVar[str | None] = None

    image_size: int | None = Field(None, ge=8, le=4096)
    """Images are made square, of this many pixels a side; what the model's image processor says when left
    out. Smaller is cheaper; models without position embeddings take any size."""
    resize: Resize = "stretch"
    """How an oblong image becomes square: stretched, its middle cut out, or black bars added."""
    augmentation: Augmentation = Augmentation()
    """Random changes to training images."""

    @property
    def columns(self) -> Mapping[str, Kind]:
        return {"image": "image", "label": self.label_kind}

    def kwargs_for(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Turn TensorFlow's padding off where the model has it."""
        return {"tf_padding": False} if config.get("model_type") in _TF_PADDED else {}

    def default_targets(self, base: nn.Module) -> tuple[str, ...]:
        """Return every linear layer and every convolution that is neither depthwise nor the head's."""
        head = self.head_modules(base)
        return tuple(name for name, layer in base.named_modules() if name not in head and adaptable(layer))

    def head_modules(self, base: nn.Module) -> tuple[str, ...]:
        """Return the layers behind the backbone.

        Raises: ModelError: there are none, so the run must name them.
        """
        found = head_of(base)
        if not found:
            raise ModelError(
                f"{type(base).__name__} does not show which layers are its head; name them in "
                "adapter.modules_to_save."
            )
        return found

    def prepare_processor(self, processor: Any, base: Any, pad_token: str | None, name: str) -> Any:
        """Check that the model takes images of this size, and read a timm processor's figures."""
        if hasattr(processor, "data_config"):
            processor = TimmProcessor.of(processor.data_config)
        size = self.size(processor)
        try:
            with torch.inference_mode():
                base(pixel_values=torch.zeros(1, 3, size, size))
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"task.image_size: {name} does not take images of {size} by {size} pixels: "
                f"{str(error).splitlines()[0][:200]}"
            ) from error
        return processor

    def size(self, processor: Any) -> int:
        """Return the side of the square image [pixels].

        Raises: ModelError: neither run nor processor say.
        """
        if self.image_size is not None:
            return self.image_size
        said = dict(processor.size or {}) if hasattr(processor, "size") else {}
        sides = {side for side in said.values() if isinstance(side, int)}
        if len(sides) != 1:
            raise ModelError("the image processor names no one square size; set task.image_size.")
        return sides.pop()

    def encode(self, rows: Sequence[Row], processor: Any, *, labelled: bool = True) -> list[Example]:
        """Open and resize `image` to [3, size, size] of uint8, once, and read the target."""
        targets = [self.target(row) if labelled else self.blank_target for row in rows]
        size, resample = self.size(processor), getattr(processor, "resample", None)
        images = [
            to_array(decode(row.values["image"], row.source), size, self.resize, resample) for row in rows
        ]
        return [Example({"image": each}, target) for each, target in zip(images, targets, strict=True)]

    def augment(
        self, examples: Sequence[Example], draw: np.random.Generator, processor: Any
    ) -> list[Example]:
        if not self.augmentation.changes:
            return list(examples)
        return [
            replace(each, features={"image": self.augmentation.draw(draw).image(each.features["image"])})
            for each in examples
        ]

    def length(self, example: Example) -> int:
        return 0

    def collate(self, examples: Sequence[Example], processor: Any, length: int | None = None) -> Batch:
        """Normalise as the model's image processor does."""
        pixels = pixel_values([e.features["image"] for e in examples], processor)
        targets = torch.tensor([e.target for e in examples])
        weights = torch.tensor([e.weight for e in examples], dtype=torch.float32)
        return Batch({"pixel_values": pixels}, targets, weights)


@dataclass(frozen=True)
class TimmProcessor:
    """What timm's image processor says, in the names that those of transformers have."""

    size: Mapping[str, int]
    image_mean: Sequence[float]
    image_std: Sequence[float]
    resample: str
    rescale_factor: float = 1 / 255

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> TimmProcessor:
        """Read timm's `data_config`."""
        _, height, width = data["input_size"]
        return cls({"height": height, "width": width}, data["mean"], data["std"], data["interpolation"])


def head_of(base: nn.Module) -> tuple[str, ...]:
    """Return the linear layers and convolutions of a transformers model that lie behind its backbone.

    A timm model inside transformers is all backbone; it names its classifier itself.
    """
    backbone = getattr(base, "base_model_prefix", "")
    ask = getattr(getattr(base, backbone, None), "get_classifier", None)
    named = () if ask is None else ask()
    classifiers = named if isinstance(named, tuple) else (named,)
    return tuple(
        name
        for name, layer in base.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        and (name.partition(".")[0] != backbone or any(layer is each for each in classifiers))
    )


def adaptable(layer: nn.Module) -> bool:
    """Whether LoRA fits a layer: PEFT's lora_A has no dilation, and groups (depthwise) would need their own.

    Subclasses are left out too: they may pad or scale in a way of their own.
    """
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.dilation == (1, 1)
    return type(layer) is nn.Linear


def to_array(image: Image, size: int, resize: Resize, resample: Any = None) -> npt.NDArray[np.uint8]:
    """Return an RGB image as a square array [3, size, size].

    Args:
        image: of any size.
        size: side [pixels].
        resize: see ImageTask.
        resample: Pillow's number or name of the filter, as image processors have it; bilinear when left out.
    """
    from PIL import Image as pillow
    from PIL import ImageOps

    filters = pillow.Resampling
    if isinstance(resample, str):
        method = filters[resample.upper()]
    else:
        method = filters.BILINEAR if resample is None else filters(resample)
    square = (size, size)
    if resize == "crop":
        image = ImageOps.fit(image, square, method)
    elif resize == "pad":
        image = ImageOps.pad(image, square, method)
    else:
        image = image.resize(square, method)
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


def pixel_values(images: Sequence[npt.NDArray[np.uint8]], processor: Any) -> Tensor:
    """Return images [n, 3, height, width] in float32, normalised by the processor's figures."""
    pixels = torch.from_numpy(np.stack(images)).float() * getattr(processor, "rescale_factor", 1 / 255)
    if getattr(processor, "do_normalize", True):
        mean, std = (
            torch.tensor(each)[:, None, None] for each in (processor.image_mean, processor.image_std)
        )
        pixels = (pixels - mean) / std
    return pixels


def decode(value: str | bytes, where: str) -> Image:
    """Open an image.

    Args:
        value: an absolute path, or a file's bytes.
        where: the row, for messages.
    Returns: an RGB image, turned as its EXIF orientation says; the first frame of several. Grey values of 16
        bits are divided by 256; transparency is dropped.
    Raises: DataError: naming row and file: missing, not an image, cut off, too large, pixels of 32 bits.
        ModelError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ModelError("reading images needs Pillow; pip install 'quorate[images]'.") from error
    named = f"image {value}" if isinstance(value, str) else f"an image of {len(value)} bytes"
    try:
        # A warning is what Pillow has for images that may be made to fill the memory.
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(value if isinstance(value, str) else io.BytesIO(value), formats=_FORMATS)
        with opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except FileNotFoundError:
        raise DataError(f"{where}: {named} does not exist; {_ADVICE}", kind="image-not-there") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        message = f"{where}: {named} has more than {limit} million pixels; make it smaller."
        raise DataError(message, kind="image-too-large") from None
    except UnidentifiedImageError:
        message = f"{where}: {named} is not a readable image ({', '.join(_FORMATS)}); {_ADVICE}"
        raise DataError(message, kind="unreadable-image") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        what = "is cut off" if "truncated" in str(error) else f"is damaged ({type(error).__name__})"
        raise DataError(f"{where}: {named} {what}; {_ADVICE}", kind="damaged-image") from None
    return _rgb(image, f"{where}: {named}")


def _rgb(image: Image, where: str) -> Image:
    from PIL import Image as pillow

    if image.mode in ("I", "F"):
        message = f"{where} has pixels of 32 bits, whose range nobody knows; save it with 8 or 16 bits."
        raise DataError(message, kind="wide-pixels")
    if image.mode.startswith("I;16"):
        import numpy as np

        # Pillow's own conversion cuts everything above 255 to white.
        return pillow.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
