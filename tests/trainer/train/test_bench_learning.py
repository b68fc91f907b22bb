"""Short runs of `make bench-learning` and `make bench-map`: all figures and pictures of their output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune_trainer.demo.circles import PALETTE, paint

pytestmark = pytest.mark.trainer


def last_line(*command: str, **environment: str) -> dict[str, float]:
    result = subprocess.run(
        [sys.executable, "-m", *command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    figures: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return figures


def test_bench_learning_reports_all_figures_and_pictures(tmp_path: Path) -> None:
    command = [
        "bench.learning",
        "--cases",
        "token",
        "--steps",
        "1",
        "--base-steps",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    figures = last_line(*command, XDG_CACHE_HOME=str(tmp_path))
    titles = ["token", "sd2_token", "sdxl_token"]
    assert set(figures) == {f"{title}_blue_{when}" for title in titles for when in ("before", "after")}
    for title in titles:
        with Image.open(tmp_path / "out" / f"{title}.png") as picture:
            assert picture.width > 6 * 64


def test_untrained_sd2_and_sdxl_bases_predict_like_the_sd1_base() -> None:
    """The additional weights of SD 2.x and SDXL have no effect before training."""
    import torch  # noqa: PLC0415  slow
    from diffusers import StableDiffusionPipeline  # noqa: PLC0415  slow

    from testing.learning.bases import BASE, build_v_prediction, build_xl  # noqa: PLC0415  slow

    base = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None, dtype=torch.float32)
    v_prediction, xl = build_v_prediction(base), build_xl(base)
    generator = torch.Generator().manual_seed(0)
    noisy, hidden, other, pooled = (
        torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 24, 64), (2, 24, 64), (2, 64))
    )
    added = {"text_embeds": pooled, "time_ids": torch.full((2, 6), 64.0)}
    ids = base.tokenizer(["red circle"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = base.unet(noisy, 500, hidden).sample
        torch.testing.assert_close(v_prediction.unet(noisy, 500, hidden).sample, wanted, rtol=1e-4, atol=1e-4)
        both = torch.cat([hidden, other], dim=-1)
        torch.testing.assert_close(
            xl.unet(noisy, 500, both, added_cond_kwargs=added).sample, wanted, rtol=1e-4, atol=1e-4
        )
        last = base.text_encoder(ids, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(xl.text_encoder(ids, output_hidden_states=True).hidden_states[-2], last)
    assert (v_prediction.scheduler.config.prediction_type, xl.scheduler.config.prediction_type) == (
        "v_prediction",
        "epsilon",
    )


def test_bench_map_reports_all_figures() -> None:
    figures = last_line("bench.map_phase", "--images", "8", "16", "--step-seconds", "0")
    for name in ("train_peak_mib_8", "map_peak_mib_16", "images_per_second_16", "wait_ms_16", "growth"):
        assert figures[name] > 0


def test_measures_distinguish_the_shapes() -> None:
    from testing.learning.cases import SCENES, is_blue, is_ring, is_square, overlap_with_edge  # noqa: PLC0415  slow

    for number, scene in enumerate(SCENES):
        pictures = {style: paint(scene, style) for style in ("plain", "squares", "rings")}
        assert [is_square(picture, number) for picture in pictures.values()] == [0, 1, 0]
        assert [is_ring(picture, number) for picture in pictures.values()] == [0, 0, 1]
        assert is_blue(pictures["plain"], number) == (scene.circle == "blue")
        assert overlap_with_edge(pictures["plain"], number) > 0.9
        assert overlap_with_edge(paint(SCENES[number - 1]), number) < 0.9
    flat = Image.fromarray(np.full((64, 64, 3), PALETTE["red"], dtype=np.uint8))
    assert is_square(flat, 0) == is_ring(flat, 0) == overlap_with_edge(flat, 0) == 0
