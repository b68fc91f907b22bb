"""The short form of `make bench-train`: two methods on a tiny base, with all the figures that it promises."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.trainer


def test_methods_are_measured() -> None:
    command = [sys.executable, "-m", "bench.train", "--families", "tiny", "--pairs", "1", "--resolution", "64"]
    methods = ["LoRA", "TextualInversion"]
    result = subprocess.run([*command, "--methods", *methods], capture_output=True, text=True, check=True)
    figures = json.loads(result.stdout.splitlines()[-1])
    for method in ("lora", "textual_inversion"):
        for figure in ("over_floor", "speedup", "peak_gib", "images_per_second"):
            assert figures[f"tiny_{method}_{figure}"] > 0
