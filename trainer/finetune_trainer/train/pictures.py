"""Pictures drawn with the model as it is, and the grid that a person compares them in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from finetune_contract.spec import ValidationSpec
from finetune_trainer.methods.method import Method
from finetune_trainer.models.noise_schedule import NoiseSchedule

_CELL = 192
"""Pictures are enlarged to at least so many pixels."""
_MARGIN = 12
_FONT_SIZE = 15
_LINE = 20
_LABEL_WIDTH = 110


@torch.no_grad()
def draw_latents(
    method: Method,
    schedule: NoiseSchedule,
    text: Mapping[str, Tensor],
    noise: Tensor,
    spec: ValidationSpec,
) -> Tensor:
    """Sample latents by deterministic DDIM (https://arxiv.org/abs/2010.02502) with classifier-free guidance.

    Args:
        method: the model.
        schedule: its noise schedule.
        text: embeddings of the empty prompt and of the prompt, first dimension 2.
        noise: where to begin, (1, C, h, w).
        spec: number of steps, and weight of the prompt (https://arxiv.org/abs/2207.12598).

    Returns:
        Scaled latents (1, C, h, w).
    """
    alphas = schedule.alphas_cumprod.tolist()
    timesteps = torch.linspace(schedule.num_timesteps - 1, 0, spec.num_inference_steps + 1).round().long().tolist()
    latents = noise
    for now, then in pairwise(timesteps):
        signal, sigma = math.sqrt(alphas[now]), math.sqrt(1 - alphas[now])
        both = torch.full((2,), now, dtype=torch.int64, device=noise.device)
        plain, guided = method.predict(latents.expand(2, -1, -1, -1), both, text).float().chunk(2)
        answer = plain + spec.guidance_scale * (guided - plain)
        if schedule.prediction_type == "epsilon":
            clean, direction = (latents - sigma * answer) / signal, answer
        else:
            clean, direction = signal * latents - sigma * answer, signal * answer + sigma * latents
        latents = math.sqrt(alphas[then]) * clean + math.sqrt(1 - alphas[then]) * direction
    return latents


def to_picture(pixels: Tensor) -> Image.Image:
    """A picture from uint8 pixels (3, H, W)."""
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy()))


def build_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], captions: Sequence[str]) -> Image.Image:
    """Rows of pictures with a label at the left, one column for each caption.

    Small pictures are enlarged without smoothing, so that what is seen is what was drawn. All are square and of one
    size.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    width = rows[0][1][0].width
    factor = max(1, -(-_CELL // width))
    cell = width * factor
    wrapped = [_wrap(caption, cell, font) for caption in captions]
    top = _MARGIN + _LINE * max(len(lines) for lines in wrapped)
    size = (_LABEL_WIDTH + len(captions) * (cell + _MARGIN), top + len(rows) * (cell + _MARGIN))
    grid = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(grid)
    for column, lines in enumerate(wrapped):
        left = _LABEL_WIDTH + column * (cell + _MARGIN)
        for number, line in enumerate(lines):
            canvas.text((left, _MARGIN // 2 + number * _LINE), line, "black", font=font)
    for number, (label, pictures) in enumerate(rows):
        y = top + number * (cell + _MARGIN)
        canvas.multiline_text((_MARGIN, y + cell // 2 - _LINE), label, "black", font=font)
        for column, picture in enumerate(pictures):
            grid.paste(
                picture.resize((cell, cell), Image.Resampling.NEAREST), (_LABEL_WIDTH + column * (cell + _MARGIN), y)
            )
    return grid


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Break a text into lines of at most `width` pixels, between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
