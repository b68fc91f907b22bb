"""What each method is to learn on the circles base, and how its pictures are judged; called by `bench.learning`.

The base has seen plain circles only. Style: it learns to draw squares. Subject: a prompt comes to mean one yellow ring,
and circles stay circles. Token: a new word comes to mean a colour. Condition: the circle is drawn where the edge is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune_trainer.demo.circles import Scene, make_dataset, make_scene, paint
from finetune_trainer.demo.picture_metrics import look_at

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
    """One number of a case: the mean over some of its pictures.

    Attributes:
        key: its name.
        what: what it is, for a person.
        pictures: which pictures it is taken of.
        number: tells of picture i how far it is what was to be learnt, from 0 to 1.
    """

    key: str
    what: str
    pictures: range
    number: Callable[[Image.Image, int], float]


@dataclass(frozen=True)
class Case:
    """Something to learn.

    Attributes:
        training: the manifest's settings.
        steps: enough to learn it from the sd1 base.
        data: writes the data set into a folder.
        prompts: what is drawn before and after.
        measures: what is told of the pictures.
        conditioning: column of the conditioning images, where there are any.
        steps_on: by family where that is other: what decides the place and the shape is learnt sooner from v, whose
            loss has more weight where there is much noise.
    """

    training: dict[str, Any]
    steps: int
    data: Callable[[Path], Path]
    prompts: Sequence[str]
    measures: tuple[Measure, ...]
    conditioning: str | None = None
    steps_on: Mapping[str, int] = field(default_factory=dict)


def shape_of(picture: Image.Image) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Where a picture differs from its frame."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
    frame = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)])
    far: np.ndarray[Any, np.dtype[np.bool_]] = np.linalg.norm(pixels - np.median(frame, axis=0), axis=2) > _CONTRAST
    return far


def is_square(picture: Image.Image, number: int) -> float:
    """1 where the shape fills its box, as a square does; a disc fills 0.785 of it."""
    del number
    rows, columns = np.nonzero(shape_of(picture))
    if len(rows) == 0:
        return 0.0
    return float(len(rows) / (np.ptp(rows) + 1) / (np.ptp(columns) + 1) > 0.89)


def is_ring(picture: Image.Image, number: int) -> float:
    """1 where there is a shape whose middle is empty."""
    del number
    shape = shape_of(picture)
    rows, columns = np.nonzero(shape)
    if len(rows) == 0:
        return 0.0
    middle, centre = round(rows.mean()), round(columns.mean())
    return float(shape[middle - 1 : middle + 2, centre - 1 : centre + 2].mean() < 0.5)


def is_class(picture: Image.Image, number: int) -> float:
    """1 where the class's prompt still gives a full circle in its colours."""
    return float(look_at(picture).caption == _CLASS and is_ring(picture, number) == 0)


def is_blue(picture: Image.Image, number: int) -> float:
    """1 where the circle is blue."""
    del number
    return float(look_at(picture).circle == "blue")


def overlap_with_edge(picture: Image.Image, number: int) -> float:
    """Overlap (intersection over union) of the shape with the disc whose edge was the condition."""
    scene = SCENES[number]
    down, across = np.indices((picture.height, picture.width)) + 0.5
    size = picture.width
    disc = np.hypot(across - scene.x * size, down - scene.y * size) <= scene.radius * size
    shape = shape_of(picture)
    return float((disc & shape).sum() / max(1, (disc | shape).sum()))


def circles(style: str) -> Callable[[Path], Path]:
    """The circles set in a style."""
    return lambda folder: make_dataset(folder, style=style, num_train=256, num_validation=NUM_PICTURES)


def rings(folder: Path) -> Path:
    """A few photos of one yellow ring, without captions, as a person would bring them."""
    folder.mkdir()
    for number in range(6):
        scene = make_scene(0, "train", number)
        paint(Scene("yellow", "purple", scene.x, scene.y, scene.radius), "rings").save(folder / f"{number}.png")
    return folder


def blue_things(folder: Path) -> Path:
    """Blue circles whose captions have a new word for the colour."""
    make_dataset(folder, num_train=600, num_validation=1)
    path = folder / "train" / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    blue = [{**row, "text": row["text"].replace("blue", "<sea>", 1)} for row in rows if row["text"].startswith("blue")]
    path.write_text("".join(json.dumps(row) + "\n" for row in blue), encoding="utf-8")
    return folder


_SQUARES = (Measure("squares", "share of squares", range(NUM_PICTURES), is_square),)
_SUBJECT_PROMPTS = [_SUBJECT] * _NUM_SUBJECT + [_CLASS] * _NUM_SUBJECT
_SUBJECT_MEASURES = (
    Measure("rings", "share of rings for the subject's prompt", range(_NUM_SUBJECT), is_ring),
    Measure("kept", "share of full circles for the class's", range(_NUM_SUBJECT, 2 * _NUM_SUBJECT), is_class),
)
CASES = {
    "style_full": Case(
        {"method": "Full", "learningRate": 2e-4}, 250, circles("squares"), CAPTIONS, _SQUARES, steps_on={"sd2": 150}
    ),
    "style_lora": Case(
        {"method": "LoRA", "learningRate": 2e-3, "lora": {"rank": 16, "targetModules": _WIDE_LORA}},
        250,
        circles("squares"),
        CAPTIONS,
        _SQUARES,
        steps_on={"sd2": 120},
    ),
    "subject": Case(
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
        rings,
        _SUBJECT_PROMPTS,
        _SUBJECT_MEASURES,
        steps_on={"sd2": 120, "sdxl": 120},
    ),
    "subject_lora": Case(
        {
            "method": "DreamBoothLoRA",
            "learningRate": 2e-3,
            "lora": {"rank": 16, "targetModules": _WIDE_LORA, "trainTextEncoder": True},
            "dreambooth": {"instancePrompt": _SUBJECT, "classPrompt": _CLASS, "numClassImages": 12},
        },
        250,
        rings,
        _SUBJECT_PROMPTS,
        _SUBJECT_MEASURES,
        steps_on={"sd2": 100, "sdxl": 100},
    ),
    "token": Case(
        {
            "method": "TextualInversion",
            "learningRate": 5e-3,
            "textualInversion": {"placeholderToken": "<sea>", "initializerToken": "circle"},
        },
        150,
        blue_things,
        [
            f"<sea> circle with {colour} background"
            for colour in ("white", "black", "yellow", "green", "pink", "orange")
        ],
        (Measure("blue", "share of blue circles", range(6), is_blue),),
        steps_on={"sd2": 80, "sdxl": 80},
    ),
    "condition": Case(
        {"method": "ControlNet", "learningRate": 1e-3},
        1200,
        circles("plain"),
        CAPTIONS,
        (Measure("overlap", "overlap of circle and edge", range(NUM_PICTURES), overlap_with_edge),),
        conditioning="conditioning_image",
        steps_on={"sd2": 300, "sdxl": 1000},
    ),
}
