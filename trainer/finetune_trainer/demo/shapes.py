"""Paints random pictures for training the VAE, so that it can represent styles on which the UNet is not trained.

The pictures have ellipses, boxes, polygons and rings that are plain, striped or shaded, in any colours, on plain,
striped or shaded backgrounds. Called by `train_base` only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from finetune_trainer.demo.circles import PALETTE, Colour

_SUPERSAMPLING: Final = 4


def paint_shapes(random: np.random.Generator, size: int) -> Image.Image:
    """Paint one to three random shapes on a random background: RGB, `size` x `size`, antialiased."""
    scale = size * _SUPERSAMPLING
    image = _fill(random, scale)
    for _ in range(int(random.integers(1, 4))):
        image.paste(_fill(random, scale), mask=_shape(random, scale))
    return image.reduce(_SUPERSAMPLING)


def _colour(random: np.random.Generator) -> Colour:
    """Return a colour of the captions, or any colour, with equal probability."""
    if random.random() < 0.5:
        return list(PALETTE.values())[int(random.integers(len(PALETTE)))]
    red, green, blue = (int(value) for value in random.integers(0, 256, size=3))
    return red, green, blue


def _fill(random: np.random.Generator, scale: int) -> Image.Image:
    """Return a picture of one colour, of stripes in two colours, or of a gradient between two colours."""
    first, second = _colour(random), _colour(random)
    kind = random.random()
    if kind < 0.5:
        return Image.new("RGB", (scale, scale), first)
    wave = _stripes(random, scale) if kind < 0.8 else _shade(random, scale)
    picture = Image.new("RGB", (scale, scale), first)
    picture.paste(second, mask=Image.fromarray((wave * 255).astype(np.uint8)))
    return picture


def _stripes(random: np.random.Generator, scale: int) -> npt.NDArray[np.float64]:
    """Return stripes of 1/16 to 1/5 of the side as values 0 and 1. Half of the pictures have them along an axis."""
    width = random.uniform(1 / 16, 1 / 5)
    return np.floor(_ramp(random, scale) / width + random.random()) % 2


def _shade(random: np.random.Generator, scale: int) -> npt.NDArray[np.float64]:
    """Return a linear gradient from 0 to 1 over the picture."""
    ramp = _ramp(random, scale)
    shade: npt.NDArray[np.float64] = (ramp - ramp.min()) / (ramp.max() - ramp.min())
    return shade


def _ramp(random: np.random.Generator, scale: int) -> npt.NDArray[np.float64]:
    """Return the position of each pixel along a random direction, in units of the picture's side."""
    angle = random.integers(2) * np.pi / 2 if random.random() < 0.5 else random.uniform(0, np.pi)
    across = np.arange(scale) / scale
    ramp: npt.NDArray[np.float64] = np.cos(angle) * across[:, None] + np.sin(angle) * across[None, :]
    return ramp


def _shape(random: np.random.Generator, scale: int) -> Image.Image:
    """Return the mask of one random shape at a random position, 0 or 255."""
    mask = Image.new("L", (scale, scale))
    draw = ImageDraw.Draw(mask)
    x, y = random.uniform(0.15, 0.85, size=2) * scale
    width, height = random.uniform(0.12, 0.40, size=2) * scale
    if random.random() < 0.5:
        height = width
    box = (x - width, y - height, x + width, y + height)
    painters: tuple[Callable[[], None], ...] = (
        lambda: draw.ellipse(box, fill=255),
        lambda: draw.rectangle(box, fill=255),
        lambda: draw.ellipse(box, outline=255, width=int(max(4, width / 3))),
        lambda: draw.polygon(_corners(random, x, y, width), fill=255),
    )
    painters[int(random.choice(len(painters), p=(0.4, 0.25, 0.15, 0.2)))]()
    return mask


def _corners(random: np.random.Generator, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Return the corners of a regular polygon with three to six corners and a random rotation."""
    num_corners = int(random.integers(3, 7))
    angles = random.uniform(0, 2 * np.pi) + np.arange(num_corners) * 2 * np.pi / num_corners
    return [(x + radius * float(np.cos(angle)), y + radius * float(np.sin(angle))) for angle in angles]
