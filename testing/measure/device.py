"""The measured device, a GPU if the machine has one, else the CPU: its memory, its step times and its peak speed."""

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
"""Dense bf16 performance from NVIDIA's data sheets, by part of the device name; the first match counts."""


def measured_device() -> torch.device:
    """Return the device to measure on this machine."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def reset_peak() -> None:
    """Reset the peak memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        memory.reset_peak()


def peak_bytes() -> int:
    """Return the peak memory since `reset_peak`: of tensors on a GPU, else the resident memory of this process."""
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else memory.peak_bytes()


def time_step(step: Callable[[], object]) -> float:
    """Return the duration of one step in seconds, until the device has completed it."""
    synchronize()
    started = time.monotonic()
    step()
    synchronize()
    return time.monotonic() - started


def synchronize() -> None:
    """Wait until the device has completed all work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def count_flops(step: Callable[[], object]) -> int:
    """Return the floating-point operations of a step's matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def peak_flops() -> float | None:
    """Return the GPU's bf16 operations per second from its data sheet; None for a CPU and for an unknown GPU."""
    return peak_flops_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def peak_flops_of(name: str) -> float | None:
    """Return the bf16 operations per second of the GPU with this name; None if it is unknown."""
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
