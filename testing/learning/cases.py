"""Learning goals of each method on the circles base, and the evaluation of its pictures. Called by `bench.learning`.

The base was trained on plain circles only. Style: it learns to draw squares. Subject: a prompt becomes the name of one
yellow ring, and other circles stay full. Token: a new word becomes the name of a colour. Condition: the circle is drawn
at the position of the edge.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune_trainer.demo.circles import CircleScene, make_dataset, make_scene, paint
from finetune_trainer.demo.picture_metrics import measure_picture

NUM_PICTURES = 8
SCENES = [make_scene(0, "validation", index) for index in range(NUM_PICTURES)]
CAPTIONS = [scene.caption for scene in SCENES]
_CONTRAST = 50.0
_SUBJECT = "a photo of the ring"
_CLASS = "green circle with white background"
_NUM_SUBJECT = 4
_WIDE_LORA = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]


@dataclass(frozen=True)
class Measure:
    """One number of a case: a mean over some of its pictures.

    Attributes:
        key: its name.
        what: description for the table.
        pictures: the pictures that it is computed from.
        number: returns how well picture i meets the learning goal, from 0 to 1.
    """

    key: str
    what: str
    pictures: range
    number: Callable[[Image.Image, int], float]


@dataclass(frozen=True)
class LearningCase:
    """One learning goal with its training run.

    Attributes:
        training: the manifest's settings.
        steps: training steps that are enough on the sd1 base.
        data: writes the data set into a folder and returns it.
        prompts: prompts of the pictures before and after training.
        measures: numbers that are computed from the pictures.
        conditioning: column of the conditioning images; None if the method needs none.
        steps_on: training steps on other families, if different. Position and shape are learnt faster with v
            prediction, whose loss has more weight at high noise.
    """

    training: dict[str, Any]
    steps: int
    data: Callable[[Path], Path]
    prompts: Sequence[str]
    measures: tuple[Measure, ...]
    conditioning: str | None = None
    steps_on: Mapping[str, int] = field(default_factory=dict)


def shape_mask(picture: Image.Image) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return the mask (H, W) of the pixels that differ from the picture's frame."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
    frame = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)])
    far: np.ndarray[Any, np.dtype[np.bool_]] = np.linalg.norm(pixels - np.median(frame, axis=0), axis=2) > _CONTRAST
    return far


def is_square(picture: Image.Image, number: int) -> float:
    """Return 1 if the shape fills its bounding box, as a square does; a disc fills 0.785 of it."""
    del number
    rows, columns = np.nonzero(shape_mask(picture))
    if len(rows) == 0:
        return 0.0
    return float(len(rows) / (np.ptp(rows) + 1) / (np.ptp(columns) + 1) > 0.89)


def is_ring(picture: Image.Image, number: int) -> float:
    """Return 1 if the picture has a shape with an empty centre."""
    del number
    shape = shape_mask(picture)
    rows, columns = np.nonzero(shape)
    if len(rows) == 0:
        return 0.0
    row, column = round(rows.mean()), round(columns.mean())
    return float(shape[row - 1 : row + 2, column - 1 : column + 2].mean() < 0.5)


def is_class(picture: Image.Image, number: int) -> float:
    """Return 1 if the picture is a full circle in the colours of the class prompt."""
    return float(measure_picture(picture).caption == _CLASS and is_ring(picture, number) == 0)


def is_blue(picture: Image.Image, number: int) -> float:
    """Return 1 if the circle is blue."""
    del number
    return float(measure_picture(picture).circle == "blue")


def overlap_with_edge(picture: Image.Image, number: int) -> float:
    """Return the overlap (intersection over union) of the shape with the disc whose edge was the condition."""
    scene = SCENES[number]
    down, across = np.indices((picture.height, picture.width)) + 0.5
    size = picture.width
    disc = np.hypot(across - scene.x * size, down - scene.y * size) <= scene.radius * size
    shape = shape_mask(picture)
    return float((disc & shape).sum() / max(1, (disc | shape).sum()))


def circles_writer(style: str) -> Callable[[Path], Path]:
    """Return a writer of the circles data set in a style."""
    return lambda folder: make_dataset(folder, style=style, num_train=256, num_validation=NUM_PICTURES)


def write_rings(folder: Path) -> Path:
    """Write a few photos of one yellow ring, without captions, as a user would provide them."""
    folder.mkdir()
    for number in range(6):
        scene = make_scene(0, "train", number)
        paint(CircleScene("yellow", "purple", scene.x, scene.y, scene.radius), "rings").save(folder / f"{number}.png")
    return folder


def write_blue_circles(folder: Path) -> Path:
    """Write blue circles whose captions name the colour with a new word."""
    make_dataset(folder, num_train=600, num_validation=1)
    path = folder / "train" / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    blue = [{**row, "text": row["text"].replace("blue", "<sea>", 1)} for row in rows if row["text"].startswith("blue")]
    path.write_text("".join(json.dumps(row) + "\n" for row in blue), encoding="utf-8")
    return folder


_SQUARES = (Measure("squares", "share of squares", range(NUM_PICTURES), is_square),)
_SUBJECT_PROMPTS = [_SUBJECT] * _NUM_SUBJECT + [_CLASS] * _NUM_SUBJECT
_SUBJECT_MEASURES = (
    Measure("rings", "share of rings for the subject prompt", range(_NUM_SUBJECT), is_ring),
    Measure("kept", "share of full circles for the class prompt", range(_NUM_SUBJECT, 2 * _NUM_SUBJECT), is_class),
)
_FULL = {"method": "Full", "learningRate": 2e-4}
_LORA = {"method": "LoRA", "learningRate": 2e-3, "lora": {"rank": 16, "targetModules": _WIDE_LORA}}


def _style(training: dict[str, Any], steps_of_sd2: int) -> LearningCase:
    """Return the case in which circles become squares."""
    return LearningCase(training, 250, circles_writer("squares"), CAPTIONS, _SQUARES, steps_on={"sd2": steps_of_sd2})


CASES = {
    "style_full": _style(_FULL, 150),
    "style_lora": _style(_LORA, 120),
    # The same weights and draws in bf16: with fp32 weights next to them, and stored in bf16 only.
    "style_full_mixed": _style({**_FULL, "precision": "bf16"}, 150),
    "style_full_bf16": _style({**_FULL, "precision": "bf16", "weightPrecision": "bf16"}, 150),
    # With the learning rates of AdamW.
    "style_full_adafactor": _style({**_FULL, "optimizer": "adafactor"}, 150),
    "style_lora_adafactor": _style({**_LORA, "optimizer": "adafactor"}, 120),
    "subject": LearningCase(
        {
            "method": "DreamBooth",
            "learningRate": 2e-4,
            "dreambooth": {
                "instancePrompt": _SUBJECT,
                "classPrompt": _CLASS,
                "numClassImages": 12,
                "trainTextEncoder": True,
            },
        },
        300,
        write_rings,
        _SUBJECT_PROMPTS,
        _SUBJECT_MEASURES,
        steps_on={"sd2": 120, "sdxl": 120},
    ),
    "subject_lora": LearningCase(
        {
            "method": "DreamBoothLoRA",
            "learningRate": 2e-3,
            "lora": {"rank": 16, "targetModules": _WIDE_LORA, "trainTextEncoder": True},
            "dreambooth": {"instancePrompt": _SUBJECT, "classPrompt": _CLASS, "numClassImages": 12},
        },
        250,
        write_rings,
        _SUBJECT_PROMPTS,
        _SUBJECT_MEASURES,
        steps_on={"sd2": 100, "sdxl": 100},
    ),
    "token": LearningCase(
        {
            "method": "TextualInversion",
            "learningRate": 5e-3,
            "textualInversion": {"placeholderToken": "<sea>", "initializerToken": "circle"},
        },
        150,
        write_blue_circles,
        [
            f"<sea> circle with {colour} background"
            for colour in ("white", "black", "yellow", "green", "pink", "orange")
        ],
        (Measure("blue", "share of blue circles", range(6), is_blue),),
        steps_on={"sd2": 80, "sdxl": 80},
    ),
    "condition": LearningCase(
        {"method": "ControlNet", "learningRate": 1e-3},
        1200,
        circles_writer("plain"),
        CAPTIONS,
        (Measure("overlap", "overlap of circle and edge", range(NUM_PICTURES), overlap_with_edge),),
        conditioning="conditioning_image",
        steps_on={"sd2": 300, "sdxl": 1000},
    ),
}
