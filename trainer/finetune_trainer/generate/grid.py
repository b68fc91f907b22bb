"""A grid of pictures with labels: one row for each prompt, one column for each set of weights. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_MIN_CELL = 128
"""Smallest width of a cell in pixels; smaller pictures are enlarged without smoothing."""
_MARGIN, _LINE, _FONT_SIZE = 12, 20, 15
_LABEL_WIDTH = 220

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def build_grid(labels: Sequence[str], rows: Sequence[str], columns: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Return the grid.

    Args:
        labels: labels of the columns.
        rows: labels of the rows.
        columns: pictures of each column, all of one size.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    first = columns[0][0]
    factor = -(-_MIN_CELL // first.width)
    width, height = first.width * factor, first.height * factor
    tops = [_wrapped(label, width, font) for label in labels]
    sides = [_wrapped(row, _LABEL_WIDTH - 2 * _MARGIN, font) for row in rows]
    top = _MARGIN + _LINE * max(len(lines) for lines in tops)
    heights = [max(height, _LINE * len(lines)) + _MARGIN for lines in sides]
    grid = Image.new("RGB", (_LABEL_WIDTH + len(labels) * (width + _MARGIN), top + sum(heights)), "white")
    canvas = ImageDraw.Draw(grid)
    for column, lines in enumerate(tops):
        _write(canvas, (_LABEL_WIDTH + column * (width + _MARGIN), _MARGIN // 2), lines, font)
    y = top
    for row, lines in enumerate(sides):
        _write(canvas, (_MARGIN, y), lines, font)
        for column, pictures in enumerate(columns):
            place = (_LABEL_WIDTH + column * (width + _MARGIN), y)
            grid.paste(pictures[row].resize((width, height), Image.Resampling.NEAREST), place)
        y += heights[row]
    return grid


def _write(canvas: ImageDraw.ImageDraw, place: tuple[int, int], lines: Sequence[str], font: Font) -> None:
    for number, line in enumerate(lines):
        canvas.text((place[0], place[1] + number * _LINE), line, "black", font=font)


def _wrapped(text: str, width: int, font: Font) -> list[str]:
    """Break a text into lines of at most `width` pixels: between words, and inside longer words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
