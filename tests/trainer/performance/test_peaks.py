"""The table of peaks: names as drivers report them."""

from __future__ import annotations

import pytest
import torch

from finetune_contract import environment
from finetune_contract.spec import Precision, TrainingSpec
from finetune_trainer.performance.peaks import TERA, peak_flops
from finetune_trainer.performance.setup import known_peak

CPU = torch.device("cpu")
NAMES = {
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA B200": 2250,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A10G": 70,
    "NVIDIA A10": 125,
    "NVIDIA L4": 121,
    "NVIDIA L40S": 362,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5090": 209.5,
    "AMD Instinct MI300X": 1307.4,
}


@pytest.mark.parametrize(("name", "bf16"), NAMES.items())
def test_known_devices(name: str, bf16: float) -> None:
    assert peak_flops(name, Precision.BF16, allows_tf32=False) == bf16 * TERA
    assert peak_flops(name, Precision.FP16, allows_tf32=False) == bf16 * TERA
    plain, tf32 = (peak_flops(name, Precision.FP32, allows_tf32=allowed) or 0 for allowed in (False, True))
    assert plain <= tf32 <= bf16 * TERA


@pytest.mark.parametrize(("name", "fp16", "fp32"), [("Tesla T4", 65, 8.1), ("Tesla V100-SXM2-16GB", 125, 15.7)])
def test_devices_without_bf16_and_tf32(name: str, fp16: float, fp32: float) -> None:
    assert peak_flops(name, Precision.BF16, allows_tf32=True) is None
    assert peak_flops(name, Precision.FP16, allows_tf32=True) == fp16 * TERA
    assert peak_flops(name, Precision.FP32, allows_tf32=True) == fp32 * TERA


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA L40",
        "NVIDIA A100X",
        "Some other GPU",
    ],
)
def test_unknown_devices_and_parts_of_devices_have_no_peak(name: str) -> None:
    assert peak_flops(name, Precision.BF16, allows_tf32=False) is None


@pytest.mark.parametrize(
    ("given", "peak"), [("", None), ("2.5", 2.5e12), ("0", None), ("-1", None), ("nan", None), ("fast", None)]
)
def test_the_peak_can_be_given(given: str, peak: float | None) -> None:
    training = TrainingSpec.model_validate({"method": "LoRA"})
    assert known_peak(training, CPU, {environment.PEAK_TERAFLOPS: given}) == peak
    assert known_peak(training, CPU, {}) is None
