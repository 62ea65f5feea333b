"""What tasks on images have in common: opening an image file."""

from __future__ import annotations

import io
import struct
import warnings
from typing import TYPE_CHECKING

from quorate.shared.errors import DataError, ModelError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
"""Endings of files that are taken for images in a folder of them."""
# No others: some of Pillow's formats start programs (EPS) or read what nobody means by an image.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
_ADVICE = "correct the row, replace the file, or remove the row."


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
        raise DataError(f"{where}: {named} does not exist; {_ADVICE}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise DataError(f"{where}: {named} has more than {limit} million pixels; make it smaller.") from None
    except UnidentifiedImageError:
        raise DataError(
            f"{where}: {named} is not a readable image ({', '.join(_FORMATS)}); {_ADVICE}"
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        what = "is cut off" if "truncated" in str(error) else f"is damaged ({type(error).__name__})"
        raise DataError(f"{where}: {named} {what}; {_ADVICE}") from None
    return _rgb(image, f"{where}: {named}")


def _rgb(image: Image, where: str) -> Image:
    from PIL import Image as pillow

    if image.mode in ("I", "F"):
        raise DataError(
            f"{where} has pixels of 32 bits, whose range nobody knows; save it with 8 or 16 bits."
        )
    if image.mode.startswith("I;16"):
        import numpy as np

        # Pillow's own conversion cuts everything above 255 to white.
        return pillow.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
