"""Decodes image files, and prepares the pixels that the VAE takes."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pillow_heif
import torch
from PIL import Image, ImageOps
from torch import Tensor

from finetune_trainer import patience
from finetune_trainer.data.images.colours import to_rgb
from finetune_trainer.data.sampling.shapes import Size
from finetune_trainer.data.sources.base import SampleSet, SampleSource
from finetune_trainer.errors import DataError, RankError

VERSION = 1
"""Raised when the decoder reads images that it did not read before: broken ones are then checked again."""
_MAX_PIXELS = 500_000_000
"""Larger images are refused: a small file can claim any size and use up the memory. Cameras reach 200 million."""
_MAX_RESIZED_PIXELS = 1 << 26
"""Images that would be larger than this after resizing, because they are very narrow, are cropped first."""

# Pillow raises an error from twice this number on.
Image.MAX_IMAGE_PIXELS = _MAX_PIXELS // 2
pillow_heif.register_heif_opener()


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

    def read() -> Image.Image:
        with source.open(index) as file, image_errors(source.name(index)):
            return decode(file)

    return patience.wait_out(f"dataset.source: reading {source.name(index)}", read)


def decode_conditioning(source: SampleSet, index: int) -> Image.Image:
    """Return the conditioning image of a sample as RGB.

    Raises:
        DataError: it is broken.
    """
    name = f"the conditioning image of {source.name(index)}"

    def read() -> Image.Image:
        with source.open_conditioning(index) as file, image_errors(name):
            return decode(file)

    return patience.wait_out(f"dataset.source: reading {name}", read)


def read_conditions(paths: Sequence[str], resolution: int) -> list[Tensor]:
    """Return conditioning images for pictures, cropped at the centre, each float32 (3, H, W) in [0, 1].

    Raises:
        DataError: one is missing or broken.
    """
    return [_read_condition(Path(path), number, resolution) for number, path in enumerate(paths)]


def _read_condition(path: Path, number: int, resolution: int) -> Tensor:
    field = f"training.validation.images[{number}]"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{field}: {path} cannot be read: {error.strerror}; write the path of an image that the pods can read"
        ) from error
    try:
        with image_errors(str(path)):
            image = decode(io.BytesIO(data))
    except DataError as error:
        raise DataError(f"{field}: {path} is not a complete image; replace it") from error
    return (to_pixels(image, (resolution, resolution), CENTRE, Image.Resampling.BILINEAR) + 1) / 2


@contextlib.contextmanager
def image_errors(name: str) -> Iterator[None]:
    """Translate the errors of decoding an image within this block to a DataError."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise DataError(
            f"dataset.source: {name} has more than {_MAX_PIXELS // 1_000_000} million pixels; scale it down, or remove "
            "it from the data set"
        ) from error
    except (RankError, MemoryError):
        raise
    except Exception as error:
        # Decoders raise many classes (struct.error, IndexError, RuntimeError, ...) for damaged files.
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
        return to_rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    """Rotate an image according to its EXIF data; damaged EXIF data is ignored."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


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
    box = (crop.left, crop.top, crop.left + target[0], crop.top + target[1])
    if crop.width * crop.height > _MAX_RESIZED_PIXELS:
        horizontal, vertical = image.width / crop.width, image.height / crop.height
        source = (box[0] * horizontal, box[1] * vertical, box[2] * horizontal, box[3] * vertical)
        image = image.resize(target, resample, box=source)
    else:
        if (crop.width, crop.height) != image.size:
            image = image.resize((crop.width, crop.height), resample)
        image = image.crop(box)
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
