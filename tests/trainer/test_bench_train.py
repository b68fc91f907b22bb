"""The short form of `make bench-train`: two methods on a tiny base, with all the figures that it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.trainer


def test_methods_are_measured() -> None:
    command = [sys.executable, "-m", "bench.train", "--families", "tiny", "--pairs", "1", "--resolution", "64"]
    methods = ["LoRA", "TextualInversion"]
    result = subprocess.run([*command, "--methods", *methods], capture_output=True, text=True, check=True)
    figures = json.loads(result.stdout.splitlines()[-1])
    for method in ("lora", "textual_inversion"):
        for figure in ("over_floor", "speedup", "peak_gib", "images_per_second"):
            assert figures[f"tiny_{method}_{figure}"] > 0


def test_a_trained_base_of_random_weights_is_written(tmp_path: Path) -> None:
    from bench.train_models import RandomFamily  # noqa: PLC0415  slow to import

    family = RandomFamily("tiny")
    files = family.write_pipeline(tmp_path, {"unet": family.load_unet(torch.float32)})
    names = {str(path.relative_to(tmp_path)) for path in files}
    assert names == {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
