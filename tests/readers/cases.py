"""What the writer hands to the readers: one case for each output. Only the standard library, for every environment."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

NUM_STEPS = 3
"""Denoising steps of the pictures. 999 / 3 is an integer, so that DDIM of diffusers uses the same timesteps."""
GUIDANCE_SCALE = 2.0
RESOLUTION = 16
_FILE = "cases.json"


@dataclass(frozen=True)
class Case:
    """One output, and what a reader needs to draw the picture that the trainer drew.

    Attributes:
        name: method, family and format, for messages.
        family: family of the base.
        kind: how the output is read; a key of `read.READERS`.
        base: folder of the base.
        original: the base as a single file, with the names of the original code.
        output: folder of the output.
        prompt: prompt of the picture.
        token: new token of a textual inversion.
        picture: the trainer's picture of the trained model.
        noise: safetensors file with the initial latents of the picture.
        condition: conditioning image of a ControlNet.
    """

    name: str
    family: str
    kind: str
    base: str
    original: str
    output: str
    prompt: str
    token: str
    picture: str
    noise: str
    condition: str


def write_cases(folder: Path, cases: Iterable[Case]) -> None:
    """Write the list of cases into a folder."""
    (folder / _FILE).write_text(json.dumps([asdict(case) for case in cases], indent=1), encoding="utf-8")


def read_cases(folder: Path) -> list[Case]:
    """Return the cases in a folder."""
    return [Case(**each) for each in json.loads((folder / _FILE).read_text(encoding="utf-8"))]
