"""Decodes image files, and prepares the pixels that the VAE takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from finetune_trainer.data.sampling.shapes import Size
from finetune_trainer.data.sources.base import SampleSet, SampleSource
from finetune_trainer.errors import DataError

_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I")


@dataclass(frozen=True)
class CropView:
    """The part of a resized image that is cropped, and whether it is mirrored.

    Attributes:
        left: horizontal position as a fraction of the free space: 0 is the leftmost crop, 1 the rightmost.
        top: vertical position as a fraction of the free space: 0 is the topmost crop, 1 the lowest.
        flip: mirror left and right.
    """

    left: float = 0.5
    top: float = 0.5
    flip: bool = False


CENTRE = CropView()


def decode_sample(source: SampleSource, index: int) -> Image.Image:
    """Return the image of a sample as RGB.

    Raises:
        DataError: it is broken.
    """
    with source.open(index) as file, image_errors(source.name(index)):
        return decode(file)


def decode_conditioning(source: SampleSet, index: int) -> Image.Image:
    """Return the conditioning image of a sample as RGB.

    Raises:
        DataError: it is broken.
    """
    with source.open_conditioning(index) as file, image_errors(f"the conditioning image of {source.name(index)}"):
        return decode(file)


@contextlib.contextmanager
def image_errors(name: str) -> Iterator[None]:
    """Translate the errors of decoding an image within this block to a DataError."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"dataset.source: {name} is not a complete image: {error}; replace it, or remove it from the data set"
        ) from error


def decode(file: IO[bytes]) -> Image.Image:
    """Decode an image as RGB, in the orientation of its EXIF data, with transparent parts on white.

    Raises:
        OSError: it is not a complete image of a supported format.
    """
    with Image.open(file) as image:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB with 8 bits per channel."""
    if image.mode in _SIXTEEN_BIT:
        # Pillow clips 16-bit values at 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image, dtype=np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


@dataclass(frozen=True)
class Crop:
    """The position of a crop: at left and top, in pixels, of an image that is resized to width x height."""

    width: int
    height: int
    left: int
    top: int


def crop_of(size: Size, target: Size, view: CropView) -> Crop:
    """Return the crop of a view for an image of (width, height), which is resized until it just covers `target`."""
    scale = max(end / side for end, side in zip(target, size, strict=True))
    width, height = (max(end, round(side * scale)) for end, side in zip(target, size, strict=True))
    return Crop(width, height, round((width - target[0]) * view.left), round((height - target[1]) * view.top))


def to_pixels(
    image: Image.Image, target: Size, view: CropView, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Tensor:
    """Resize an image until it just covers `target` (width, height), crop it to this size, and mirror it if needed.

    Returns:
        float32 (3, height, width) in [-1, 1].
    """
    crop = crop_of(image.size, target, view)
    if (crop.width, crop.height) != image.size:
        image = image.resize((crop.width, crop.height), resample)
    image = image.crop((crop.left, crop.top, crop.left + target[0], crop.top + target[1]))
    if view.flip:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def micro_conditioning(size: Size, target: Size, view: CropView) -> Tensor:
    """Return SDXL's conditions on the size of an image (https://arxiv.org/abs/2307.01952, section 2.2).

    If the view is mirrored, the left of the crop is counted in the mirrored image, because the model gets that image.

    Args:
        size: width and height of the image as stored.
        target: width and height of the training.
        view: the part of the image that is cropped.

    Returns:
        float32 (6,): height and width as stored, top and left of the crop, height and width of the crop.
    """
    crop = crop_of(size, target, view)
    left = crop.width - target[0] - crop.left if view.flip else crop.left
    return torch.tensor([size[1], size[0], crop.top, left, target[1], target[0]], dtype=torch.float32)
