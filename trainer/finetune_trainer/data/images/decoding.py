"""From an image file's bytes to the pixels that the VAE takes. Pure; called by sources and encoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I")


Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class View:
    """Which part of a resized image is seen, as fractions of the room there is to move, and whether mirrored.

    Attributes:
        left: 0 is the leftmost crop, 1 the rightmost.
        top: 0 is the topmost crop, 1 the lowest.
        flip: mirror left and right.
    """

    left: float = 0.5
    top: float = 0.5
    flip: bool = False


CENTRE = View()


def decode(file: IO[bytes]) -> Image.Image:
    """Read an image as RGB, the way up that its EXIF says, transparent parts on white.

    Raises:
        OSError: it is not a whole image of a known format.
    """
    with Image.open(file) as image:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB with 8 bits a channel from whatever mode a file has."""
    if image.mode in _SIXTEEN_BIT:
        # Pillow clips 16-bit values at 255 in place of scaling them.
        image = Image.fromarray((np.asarray(image, dtype=np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


@dataclass(frozen=True)
class Crop:
    """Where a square is cut: from an image resized to width x height, at left and top, in pixels."""

    width: int
    height: int
    left: int
    top: int


def crop_of(size: Size, target: Size, view: View) -> Crop:
    """The crop that a view means for an image of (width, height): resized so that it just covers `target`."""
    scale = max(end / side for end, side in zip(target, size, strict=True))
    width, height = (max(end, round(side * scale)) for end, side in zip(target, size, strict=True))
    return Crop(width, height, round((width - target[0]) * view.left), round((height - target[1]) * view.top))


def to_pixels(
    image: Image.Image, target: Size, view: View, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Tensor:
    """Resize until it just covers `target` (width, height), crop to it, maybe mirror.

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


def micro_conditioning(size: Size, target: Size, view: View) -> Tensor:
    """What SDXL is told of an image's size (https://arxiv.org/abs/2307.01952, section 2.2).

    The crop is counted in the mirrored image where the view is mirrored, as it is what the model sees.

    Args:
        size: width and height of the image as stored.
        target: width and height that are trained on.
        view: part of it that is seen.

    Returns:
        float32 (6,): height and width as stored, top and left of the crop, height and width of the crop.
    """
    crop = crop_of(size, target, view)
    left = crop.width - target[0] - crop.left if view.flip else crop.left
    return torch.tensor([size[1], size[0], crop.top, left, target[1], target[0]], dtype=torch.float32)
