"""The short form of `make bench-train`: two methods on a tiny base, with all the figures that it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from testing.measure.device import count_flops, peak_of

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
    from testing.measure.architectures import RandomFamily  # noqa: PLC0415  slow to import

    family = RandomFamily("tiny")
    files = family.write_pipeline(tmp_path, {"unet": family.load_unet(torch.float32)})
    names = {str(path.relative_to(tmp_path)) for path in files}
    assert names == {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}


def test_arithmetic_is_counted_forward_and_backward() -> None:
    weight, x = torch.ones(8, 16, requires_grad=True), torch.ones(4, 16, requires_grad=True)
    product = 2 * 4 * 8 * 16
    assert count_flops(lambda: (x @ weight.t()).sum().backward()) == 3 * product  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA H200", 989.4), ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA L4", 121.0)],
)
def test_peaks_of_gpus(name: str, tflops: float) -> None:
    assert peak_of(name) == tflops * 1e12


def test_the_peak_of_an_unknown_gpu_is_not_guessed() -> None:
    assert peak_of("NVIDIA T400") is None
