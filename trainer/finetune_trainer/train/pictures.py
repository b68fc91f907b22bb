"""The grid of validation pictures, for comparison by the user."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_CELL = 192
"""Minimum width in pixels that pictures are enlarged to."""
_MARGIN = 12
_FONT_SIZE = 15
_LINE = 20
_LABEL_WIDTH = 110


def to_picture(pixels: Tensor) -> Image.Image:
    """Return a picture from uint8 pixels (3, H, W)."""
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy()))


def build_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], captions: Sequence[str]) -> Image.Image:
    """Return a grid: rows of pictures with a label at the left, one column for each caption.

    All pictures must be square and have the same size. Small pictures are enlarged without smoothing, so that the grid
    shows the original pixels.
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
