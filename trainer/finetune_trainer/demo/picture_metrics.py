"""Measures the colours and the shape in generated pictures, and combines pictures in a grid.

Called by `train_base`, the demo and the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from finetune_trainer.demo.circles import PALETTE, caption

_COLOURS = np.array(list(PALETTE.values()), dtype=np.float64)
# Smallest distance of a pixel of the shape from the background's colour, in sRGB units.
_CONTRAST = 50.0


@dataclass(frozen=True, slots=True)
class PictureMetrics:
    """The nearest colour names in a picture, and the roundness of its shape: 1 for a disc, 0 without a shape."""

    circle: str
    background: str
    roundness: float

    @property
    def caption(self) -> str:
        """The caption that describes the picture."""
        return caption(self.circle, self.background)


def measure_picture(image: Image.Image) -> PictureMetrics:
    """Measure a picture: the background is the colour of its border, and the shape is what differs from it."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    frame = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)])
    background = np.median(frame, axis=0)
    shape = np.linalg.norm(pixels - background, axis=2) > _CONTRAST
    if not shape.any():
        return PictureMetrics(_nearest(background), _nearest(background), 0.0)
    return PictureMetrics(_nearest(np.median(pixels[shape], axis=0)), _nearest(background), _roundness(shape))


def sample_images(
    pipeline: StableDiffusionPipeline,
    captions: Sequence[str],
    *,
    seed: int = 0,
    num_inference_steps: int = 25,
    guidance_scale: float = 4.0,
) -> list[Image.Image]:
    """Generate one picture for each caption with DDIM. The initial noise of picture i depends only on (seed, i)."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = pipeline(
        list(captions),
        generator=[torch.Generator().manual_seed(seed * 100_000 + index) for index in range(len(captions))],
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
    ).images
    return images


def picture_grid(rows: Sequence[Sequence[Image.Image]], *, margin: int = 4) -> Image.Image:
    """Combine rows of pictures of equal size in one picture."""
    width, height = rows[0][0].size
    columns = max(len(row) for row in rows)
    grid = Image.new("RGB", (columns * (width + margin) + margin, len(rows) * (height + margin) + margin), "grey")
    for top, row in enumerate(rows):
        for left, image in enumerate(row):
            grid.paste(image, (margin + left * (width + margin), margin + top * (height + margin)))
    return grid


def _nearest(colour: npt.NDArray[np.float64]) -> str:
    return list(PALETTE)[int(np.linalg.norm(_COLOURS - colour, axis=1).argmin())]


def _roundness(shape: npt.NDArray[np.bool_]) -> float:
    """Return the overlap (intersection over union) of a shape with the disc of the same area and centre."""
    rows, columns = np.nonzero(shape)
    down, across = np.indices(shape.shape)
    distance = np.hypot(down - rows.mean(), across - columns.mean())
    disc = distance <= np.sqrt(shape.sum() / np.pi)
    return float((disc & shape).sum() / (disc | shape).sum())
