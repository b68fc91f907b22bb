"""What a person would see in a generated picture, as numbers; and grids of pictures for the person.

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
# A pixel this far from the background, in sRGB units, belongs to the shape.
_CONTRAST = 50.0


@dataclass(frozen=True, slots=True)
class Look:
    """The nearest colour names in a picture, and how round its shape is: 1 for a disc, 0 where there is no shape."""

    circle: str
    background: str
    roundness: float

    @property
    def caption(self) -> str:
        """The caption that the picture deserves."""
        return caption(self.circle, self.background)


def look_at(image: Image.Image) -> Look:
    """Tell the background by the picture's frame, and the shape by what differs from it."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    frame = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)])
    background = np.median(frame, axis=0)
    shape = np.linalg.norm(pixels - background, axis=2) > _CONTRAST
    if not shape.any():
        return Look(_nearest(background), _nearest(background), 0.0)
    return Look(_nearest(np.median(pixels[shape], axis=0)), _nearest(background), _roundness(shape))


def sample_images(
    pipeline: StableDiffusionPipeline,
    captions: Sequence[str],
    *,
    seed: int = 0,
    num_inference_steps: int = 25,
    guidance_scale: float = 4.0,
) -> list[Image.Image]:
    """One picture for each caption by DDIM; picture i starts from noise that is keyed by (seed, i) alone."""
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
    """Rows of pictures of one size as one picture."""
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
    """Overlap (intersection over union) of a shape with the disc of the same area and centre."""
    rows, columns = np.nonzero(shape)
    down, across = np.indices(shape.shape)
    distance = np.hypot(down - rows.mean(), across - columns.mean())
    disc = distance <= np.sqrt(shape.sum() / np.pi)
    return float((disc & shape).sum() / (disc | shape).sum())
