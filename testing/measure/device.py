"""The device that is measured: the GPU where there is one, else the CPU; its memory, its clock and its peak."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from testing.measure import memory

PEAK_TFLOPS = {
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "A10G": 70.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
}
"""bf16, dense, by NVIDIA's data sheets; the first name that is part of the device's counts."""


def the_device() -> torch.device:
    """What is measured on this machine."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def forget_peak() -> None:
    """Measure the peak of the memory anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        memory.forget_peak()


def peak_bytes() -> int:
    """The device's peak since `forget_peak`: of a GPU what tensors took, else this process's resident memory."""
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else memory.peak_bytes()


def measure(step: Callable[[], object]) -> float:
    """Seconds of one step, until the device is done with it."""
    wait()
    began = time.monotonic()
    step()
    wait()
    return time.monotonic() - began


def wait() -> None:
    """Until the device has nothing left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def count_flops(step: Callable[[], object]) -> int:
    """Floating-point operations of a step's matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def peak_flops() -> float | None:
    """Operations a second of the GPU in bf16, by its data sheet; None for a CPU and for an unknown GPU."""
    return peak_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def peak_of(name: str) -> float | None:
    """The same by a GPU's name."""
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
