"""Writes the circles data set: pictures of a circle on a background of another colour, with captions and edges.

The base model of the demo is trained on the style `plain` only. The other styles keep the captions and change the
appearance, so that the effect of a LoRA is easy to see. Sample `index` of a split depends only on (seed, split, index),
and it has the same position, size and colours in every style.

Called by the demo, its tests and `train_base`. Does not need torch. As a command::

    python -m finetune_trainer.demo.circles FOLDER --style stripes --num-train 64 --num-validation 16
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
from PIL import Image, ImageChops, ImageDraw

Colour: TypeAlias = tuple[int, int, int]
Box: TypeAlias = tuple[float, float, float, float]

PALETTE: Final[dict[str, Colour]] = {
    "red": (220, 30, 40),
    "orange": (255, 140, 0),
    "yellow": (250, 225, 50),
    "green": (30, 150, 60),
    "cyan": (70, 205, 230),
    "blue": (35, 70, 210),
    "purple": (125, 40, 160),
    "pink": (255, 145, 195),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
"""The colour names of the captions, with sRGB values that the mean of a few pixels can distinguish."""

SPLITS: Final = ("train", "validation")

# Pictures are drawn larger by this factor and then reduced, because PIL draws without antialiasing.
_SUPERSAMPLING: Final = 4
# The stripes are wide enough for a VAE that reduces each side by a factor of eight.
_STRIPES_PER_SIDE: Final = 10
_SPEC_FILE: Final = "circles.json"
_DESCRIPTION: Final = "Write a data set of coloured circles with captions, for trying fine-tuning."


@dataclass(frozen=True, slots=True)
class CircleScene:
    """The content of a picture: two colour names, and the position of the circle as fractions of the image's side."""

    circle: str
    background: str
    x: float
    y: float
    radius: float

    @property
    def caption(self) -> str:
        """The caption of the picture, which is the same in every style."""
        return caption(self.circle, self.background)

    def box(self, size: int) -> Box:
        """Return the square around the circle as (left, top, right, bottom), in pixels of a `size` x `size` image."""
        left, top = (self.x - self.radius) * size, (self.y - self.radius) * size
        return left, top, left + 2 * self.radius * size, top + 2 * self.radius * size


@dataclass(frozen=True, slots=True)
class CirclesSpec:
    """The arguments of a data set, which determine all its bytes."""

    style: str
    num_train: int
    num_validation: int
    size: int
    seed: int

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"style {self.style!r} does not exist; use one of {', '.join(STYLES)}")
        for name in ("num_train", "num_validation", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; use 0 or more")
        if self.size < 16:
            raise ValueError(f"size is {self.size} pixels, which is too small to show a circle; use 16 or more")


def caption(circle: str, background: str) -> str:
    """Return the caption for a pair of colours."""
    return f"{circle} circle with {background} background"


def all_captions() -> list[str]:
    """Return all captions, in the order of the palette. A circle never has the colour of its background."""
    return [caption(circle, background) for circle in PALETTE for background in PALETTE if circle != background]


def make_scene(seed: int, split: str, index: int) -> CircleScene:
    """Draw sample `index` of a split from a random generator that is keyed by (seed, split, index)."""
    key = np.random.SeedSequence([seed, SPLITS.index(split), index])
    random = np.random.Generator(np.random.Philox(key))
    names = list(PALETTE)
    circle = int(random.integers(len(names)))
    background = (circle + 1 + int(random.integers(len(names) - 1))) % len(names)
    radius = float(random.uniform(0.22, 0.36))
    x, y = random.uniform(radius + 0.04, 1 - radius - 0.04, size=2)
    return CircleScene(names[circle], names[background], float(x), float(y), radius)


def paint(scene: CircleScene, style: str = "plain", size: int = 64) -> Image.Image:
    """Paint the picture of a scene: RGB, `size` x `size`, antialiased."""
    mask = STYLES[style](scene, size * _SUPERSAMPLING).reduce(_SUPERSAMPLING)
    image = Image.new("RGB", (size, size), PALETTE[scene.background])
    image.paste(PALETTE[scene.circle], mask=mask)
    return image


def paint_edges(scene: CircleScene, style: str = "plain", size: int = 64) -> Image.Image:
    """Paint the outline of the scene's shape in white on black: RGB, `size` x `size`, antialiased."""
    scale = size * _SUPERSAMPLING
    edges = Image.new("L", (scale, scale))
    draw = ImageDraw.Draw(edges)
    outline = draw.rectangle if style == "squares" else draw.ellipse
    outline(scene.box(scale), outline=255, width=max(_SUPERSAMPLING, scale // 48))
    return edges.reduce(_SUPERSAMPLING).convert("RGB")


def make_dataset(  # noqa: PLR0913 - the arguments describe the data set completely
    folder: str | os.PathLike[str],
    *,
    style: str = "plain",
    num_train: int,
    num_validation: int,
    size: int = 64,
    seed: int = 0,
) -> Path:
    """Write the data set in the imagefolder layout of `datasets`, or finish an interrupted call.

    `folder/train` and `folder/validation` have `000000.png` ..., `edges/000000.png` ... and `metadata.jsonl` with the
    columns file_name, text and conditioning_image, which is written last. Each file is written atomically, and existing
    files are kept, so a second call is fast and changes nothing. Only one process may write to a folder at a time.

    Return the folder. Raise ValueError for invalid arguments, and if the folder has a data set with other arguments.
    """
    spec = CirclesSpec(style, num_train, num_validation, size, seed)
    root = Path(folder)
    _claim(root, spec)
    for split, num_samples in zip(SPLITS, (num_train, num_validation), strict=True):
        _write_split(root / split, spec, split, num_samples)
    return root


def _claim(root: Path, spec: CirclesSpec) -> None:
    """Write the arguments of the data set to the folder. Refuse a folder with other arguments."""
    note = root / _SPEC_FILE
    wanted = json.dumps(asdict(spec), indent=2) + "\n"
    if not note.exists():
        _write_if_missing(note, lambda part: part.write_text(wanted, encoding="utf-8"))
    elif (found := note.read_text(encoding="utf-8")) != wanted:
        raise ValueError(
            f"folder {root} has a data set with other arguments: {' '.join(found.split())}; "
            "name another folder, or empty it"
        )


def _write_split(folder: Path, spec: CirclesSpec, split: str, num_samples: int) -> None:
    rows = []
    for index in range(num_samples):
        scene = make_scene(spec.seed, split, index)
        name = f"{index:06d}.png"
        edges = f"edges/{name}"
        _save_png(folder / name, partial(paint, scene, spec.style, spec.size))
        _save_png(folder / edges, partial(paint_edges, scene, spec.style, spec.size))
        rows.append({"file_name": name, "text": scene.caption, "conditioning_image": edges})
    table = "".join(json.dumps(row) + "\n" for row in rows)
    # This file is written last, so that all the files that it names exist.
    _write_if_missing(folder / "metadata.jsonl", lambda part: part.write_text(table, encoding="utf-8"))


def _save_png(path: Path, make: Callable[[], Image.Image]) -> None:
    _write_if_missing(path, lambda part: make().save(part, format="PNG"))


def _write_if_missing(path: Path, write: Callable[[Path], object]) -> None:
    """Write a temporary file with `write` and rename it to `path`, unless `path` exists."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    write(part)
    part.replace(path)


def _disc(scene: CircleScene, scale: int) -> Image.Image:
    """Return the mask of the circle's area, 0 or 255, at `scale` x `scale`."""
    mask = Image.new("L", (scale, scale))
    ImageDraw.Draw(mask).ellipse(scene.box(scale), fill=255)
    return mask


def _striped_disc(scene: CircleScene, scale: int) -> Image.Image:
    """Return the circle behind horizontal bars of the background's colour, at positions independent of the circle."""
    rows = (np.arange(scale) * _STRIPES_PER_SIDE // scale) % 2 == 0
    stripes = Image.fromarray(np.repeat(np.where(rows, 255, 0).astype(np.uint8)[:, None], scale, axis=1))
    return ImageChops.multiply(_disc(scene, scale), stripes)


def _square(scene: CircleScene, scale: int) -> Image.Image:
    """Return the square around the circle."""
    mask = Image.new("L", (scale, scale))
    ImageDraw.Draw(mask).rectangle(scene.box(scale), fill=255)
    return mask


def _ring(scene: CircleScene, scale: int) -> Image.Image:
    """Return the circle with a hole of half its radius."""
    mask = _disc(scene, scale)
    left, top, right, bottom = scene.box(scale)
    inset = (right - left) / 4
    ImageDraw.Draw(mask).ellipse((left + inset, top + inset, right - inset, bottom - inset), fill=0)
    return mask


STYLES: Final[dict[str, Callable[[CircleScene, int], Image.Image]]] = {
    "plain": _disc,
    "stripes": _striped_disc,
    "squares": _square,
    "rings": _ring,
}
"""The area that each style paints in the circle's colour, as a mask for a scene and a side in pixels."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `make_dataset` from the command line, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m finetune_trainer.demo.circles", description=_DESCRIPTION)
    parser.add_argument("folder", type=Path, help="folder to write to; the next call finishes an interrupted one")
    parser.add_argument("--style", default="plain", choices=tuple(STYLES), help="style of the circles (default: plain)")
    parser.add_argument("--num-train", type=int, default=64, help="training samples (default: 64)")
    parser.add_argument("--num-validation", type=int, default=16, help="held-out samples (default: 16)")
    parser.add_argument("--size", type=int, default=64, help="side of an image in pixels (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    options = vars(parser.parse_args(arguments))
    try:
        folder = make_dataset(options.pop("folder"), **options)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(f"{folder}: {options['num_train']} training and {options['num_validation']} held-out samples\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
