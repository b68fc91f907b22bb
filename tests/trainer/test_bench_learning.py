"""The short forms of `make bench-learning` and `make bench-map`: all the figures and pictures that they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune_trainer.demo.circles import PALETTE, paint

pytestmark = pytest.mark.trainer


def last_line(*command: str) -> dict[str, float]:
    result = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return figures


def test_learning_is_measured(tmp_path: Path) -> None:
    figures = last_line("bench.learning", "--cases", "token", "--steps", "1", "--out", str(tmp_path))
    assert set(figures) == {"token_blue_before", "token_blue_after"}
    with Image.open(tmp_path / "token.png") as picture:
        assert picture.width > 6 * 64


def test_the_map_phase_is_measured() -> None:
    figures = last_line("bench.map_phase", "--images", "8", "16", "--step-seconds", "0")
    for name in ("train_peak_mib_8", "map_peak_mib_16", "images_per_second_16", "wait_ms_16", "growth"):
        assert figures[name] > 0


def test_the_judges_tell_the_shapes_apart() -> None:
    from bench.learning_cases import SCENES, is_blue, is_ring, is_square, overlap_with_edge  # noqa: PLC0415  slow

    for number, scene in enumerate(SCENES):
        pictures = {style: paint(scene, style) for style in ("plain", "squares", "rings")}
        assert [is_square(picture, number) for picture in pictures.values()] == [0, 1, 0]
        assert [is_ring(picture, number) for picture in pictures.values()] == [0, 0, 1]
        assert is_blue(pictures["plain"], number) == (scene.circle == "blue")
        assert overlap_with_edge(pictures["plain"], number) > 0.9
        assert overlap_with_edge(paint(SCENES[number - 1]), number) < 0.9
    flat = Image.fromarray(np.full((64, 64, 3), PALETTE["red"], dtype=np.uint8))
    assert is_square(flat, 0) == is_ring(flat, 0) == overlap_with_edge(flat, 0) == 0
