"""The fill-circles data set: a circle of one colour on a background of another, with its caption and its edges.

The base model of the demo has seen the style `plain` only. The other styles keep the captions and change the look, so
that what a LoRA has learnt can be seen at a glance. Sample `index` of a split is a function of (seed, split, index)
alone, and it has the same place, size and colours in every style.

Called by the demo, its tests and `train_base`; needs no torch. As a command::

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
"""The colour names of the captions and their sRGB values, far enough apart to be told by the mean of a few pixels."""

SPLITS: Final = ("train", "validation")

# Drawn this many times larger and averaged down: PIL draws without antialiasing.
_SUPERSAMPLING: Final = 4
# Wide enough stripes to survive a VAE that shrinks the side eight times.
_STRIPES_PER_SIDE: Final = 10
_SPEC_FILE: Final = "circles.json"


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture, free of pixels: two colour names, and the circle's place as fractions of the image's side."""

    circle: str
    background: str
    x: float
    y: float
    radius: float

    @property
    def caption(self) -> str:
        """The sentence that describes the picture, in every style."""
        return caption(self.circle, self.background)

    def box(self, size: int) -> Box:
        """The square around the circle as (left, top, right, bottom), in pixels of an image of `size` x `size`."""
        left, top = (self.x - self.radius) * size, (self.y - self.radius) * size
        return left, top, left + 2 * self.radius * size, top + 2 * self.radius * size


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """Everything that the bytes of a data set follow from."""

    style: str
    num_train: int
    num_validation: int
    size: int
    seed: int

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"style {self.style!r} is not known; use one of {', '.join(STYLES)}")
        for name in ("num_train", "num_validation", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; use 0 or more")
        if self.size < 16:
            raise ValueError(f"size is {self.size} pixels, too few to show a circle; use 16 or more")


def caption(circle: str, background: str) -> str:
    """The one form that captions of this data set have."""
    return f"{circle} circle with {background} background"


def all_captions() -> list[str]:
    """Every caption of the set, in the palette's order; a circle never has its background's colour."""
    return [caption(circle, background) for circle in PALETTE for background in PALETTE if circle != background]


def make_scene(seed: int, split: str, index: int) -> Scene:
    """Draw sample `index` of a split from a generator that is keyed by (seed, split, index)."""
    key = np.random.SeedSequence([seed, SPLITS.index(split), index])
    random = np.random.Generator(np.random.Philox(key))
    names = list(PALETTE)
    circle = int(random.integers(len(names)))
    background = (circle + 1 + int(random.integers(len(names) - 1))) % len(names)
    radius = float(random.uniform(0.22, 0.36))
    x, y = random.uniform(radius + 0.04, 1 - radius - 0.04, size=2)
    return Scene(names[circle], names[background], float(x), float(y), radius)


def paint(scene: Scene, style: str = "plain", size: int = 64) -> Image.Image:
    """The picture of a scene: RGB, `size` x `size`, antialiased."""
    mask = STYLES[style](scene, size * _SUPERSAMPLING).reduce(_SUPERSAMPLING)
    image = Image.new("RGB", (size, size), PALETTE[scene.background])
    image.paste(PALETTE[scene.circle], mask=mask)
    return image


def paint_edges(scene: Scene, style: str = "plain", size: int = 64) -> Image.Image:
    """The outline of the scene's shape in white on black: RGB, `size` x `size`, antialiased."""
    scale = size * _SUPERSAMPLING
    edges = Image.new("L", (scale, scale))
    draw = ImageDraw.Draw(edges)
    outline = draw.rectangle if style == "squares" else draw.ellipse
    outline(scene.box(scale), outline=255, width=max(_SUPERSAMPLING, scale // 48))
    return edges.reduce(_SUPERSAMPLING).convert("RGB")


def make_dataset(  # noqa: PLR0913 - the arguments are the whole description of the data set
    folder: str | os.PathLike[str],
    *,
    style: str = "plain",
    num_train: int,
    num_validation: int,
    size: int = 64,
    seed: int = 0,
) -> Path:
    """Write the data set in the image-folder form of `datasets`, or finish what an interrupted call has begun.

    Each of `folder/train` and `folder/validation` has `000000.png` ..., `edges/000000.png` ... and, written last,
    `metadata.jsonl` with the columns file_name, text and conditioning_image. Every file appears whole or not at all,
    and files that are there are kept, so calling again is cheap and changes nothing. One caller at a time.

    Returns the folder. Raises ValueError on bad arguments, and when the folder holds a data set of other arguments.
    """
    spec = DatasetSpec(style, num_train, num_validation, size, seed)
    root = Path(folder)
    _claim(root, spec)
    for split, num_samples in zip(SPLITS, (num_train, num_validation), strict=True):
        _write_split(root / split, spec, split, num_samples)
    return root


def _claim(root: Path, spec: DatasetSpec) -> None:
    """Note what the folder is for; refuse one that is for something else."""
    note = root / _SPEC_FILE
    wanted = json.dumps(asdict(spec), indent=2) + "\n"
    if not note.exists():
        _write_whole(note, lambda part: part.write_text(wanted, encoding="utf-8"))
    elif (found := note.read_text(encoding="utf-8")) != wanted:
        raise ValueError(
            f"folder {root} holds a data set of {' '.join(found.split())}; name another folder or empty it"
        )


def _write_split(folder: Path, spec: DatasetSpec, split: str, num_samples: int) -> None:
    rows = []
    for index in range(num_samples):
        scene = make_scene(spec.seed, split, index)
        name = f"{index:06d}.png"
        edges = f"edges/{name}"
        _save_png(folder / name, partial(paint, scene, spec.style, spec.size))
        _save_png(folder / edges, partial(paint_edges, scene, spec.style, spec.size))
        rows.append({"file_name": name, "text": scene.caption, "conditioning_image": edges})
    table = "".join(json.dumps(row) + "\n" for row in rows)
    # Last: a folder with this file has all the files that it names.
    _write_whole(folder / "metadata.jsonl", lambda part: part.write_text(table, encoding="utf-8"))


def _save_png(path: Path, make: Callable[[], Image.Image]) -> None:
    _write_whole(path, lambda part: make().save(part, format="PNG"))


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path` and rename it there, unless `path` is there already."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    write(part)
    part.replace(path)


def _disc(scene: Scene, scale: int) -> Image.Image:
    """Coverage of the circle's area, 0 or 255, at `scale` x `scale`."""
    mask = Image.new("L", (scale, scale))
    ImageDraw.Draw(mask).ellipse(scene.box(scale), fill=255)
    return mask


def _striped_disc(scene: Scene, scale: int) -> Image.Image:
    """The circle behind horizontal bars of the background's colour, which lie still wherever the circle is."""
    rows = (np.arange(scale) * _STRIPES_PER_SIDE // scale) % 2 == 0
    stripes = Image.fromarray(np.repeat(np.where(rows, 255, 0).astype(np.uint8)[:, None], scale, axis=1))
    return ImageChops.multiply(_disc(scene, scale), stripes)


def _square(scene: Scene, scale: int) -> Image.Image:
    """The square around the circle, in the circle's place."""
    mask = Image.new("L", (scale, scale))
    ImageDraw.Draw(mask).rectangle(scene.box(scale), fill=255)
    return mask


def _ring(scene: Scene, scale: int) -> Image.Image:
    """The circle with a hole of half its radius."""
    mask = _disc(scene, scale)
    left, top, right, bottom = scene.box(scale)
    inset = (right - left) / 4
    ImageDraw.Draw(mask).ellipse((left + inset, top + inset, right - inset, bottom - inset), fill=0)
    return mask


STYLES: Final[dict[str, Callable[[Scene, int], Image.Image]]] = {
    "plain": _disc,
    "stripes": _striped_disc,
    "squares": _square,
    "rings": _ring,
}
"""Where a style puts the circle's colour: scene and side in pixels to a mask of that side."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `make_dataset`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m finetune_trainer.demo.circles", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="where to write; an interrupted call is finished by the next one")
    parser.add_argument("--style", default="plain", choices=tuple(STYLES), help="look of the circles (default: plain)")
    parser.add_argument("--num-train", type=int, default=64, help="training samples (default: 64)")
    parser.add_argument("--num-validation", type=int, default=16, help="held-out samples (default: 16)")
    parser.add_argument("--size", type=int, default=64, help="side of an image in pixels (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other samples (default: 0)")
    options = vars(parser.parse_args(arguments))
    try:
        folder = make_dataset(options.pop("folder"), **options)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(f"{folder}: {options['num_train']} training and {options['num_validation']} held-out samples\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
