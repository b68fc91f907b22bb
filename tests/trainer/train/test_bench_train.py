"""Short run of `make bench-train`: two methods on a tiny base, with all figures of its output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from testing.measure.device import count_flops, peak_flops_of

pytestmark = pytest.mark.trainer


def test_bench_train_reports_all_figures() -> None:
    command = [sys.executable, "-m", "bench.train", "--families", "tiny", "--pairs", "1", "--resolution", "64"]
    methods = ["LoRA", "TextualInversion"]
    result = subprocess.run([*command, "--methods", *methods], capture_output=True, text=True, check=True)
    figures = json.loads(result.stdout.splitlines()[-1])
    for method in ("lora", "textual_inversion"):
        for figure in ("over_floor", "speedup", "peak_gib", "images_per_second"):
            assert figures[f"tiny_{method}_{figure}"] > 0


def test_random_base_writes_its_trained_modules(tmp_path: Path) -> None:
    from testing.measure.architectures import RandomFamily  # noqa: PLC0415  slow to import
    from testing.trainer.methods import write_pipeline  # noqa: PLC0415  slow to import

    family = RandomFamily("tiny")
    files = write_pipeline(family, tmp_path, {"unet": family.load_denoiser(torch.float32)})
    names = {str(path.relative_to(tmp_path)) for path in files}
    assert names == {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}


def test_count_flops_includes_forward_and_backward() -> None:
    weight, x = torch.ones(8, 16, requires_grad=True), torch.ones(4, 16, requires_grad=True)
    product = 2 * 4 * 8 * 16
    assert count_flops(lambda: (x @ weight.t()).sum().backward()) == 3 * product  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA H200", 989.4), ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA L4", 121.0)],
)
def test_peak_flops_of_known_gpus(name: str, tflops: float) -> None:
    assert peak_flops_of(name) == tflops * 1e12


def test_peak_flops_of_an_unknown_gpu_is_none() -> None:
    assert peak_flops_of("NVIDIA T400") is None
