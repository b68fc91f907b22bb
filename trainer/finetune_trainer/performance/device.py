"""What torch and the operating system report of a rank's device: memory, utilization, and times on a GPU.

The only module of the package that calls CUDA. It never waits for the device.
"""

from __future__ import annotations

import logging
import resource
import sys
from dataclasses import dataclass
from typing import Protocol

import torch

_LOG = logging.getLogger(__name__)
_RESIDENT_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in the system's unit of the largest resident memory."""


@dataclass(frozen=True)
class MemoryUse:
    """Memory of a rank in bytes, the most since its start.

    Attributes:
        allocated: memory of tensors on a GPU; for a CPU, the resident memory of the process.
        reserved: GPU memory that torch has reserved.
        total: memory of the GPU.
    """

    allocated: int
    reserved: int | None = None
    total: int | None = None


class Stopwatch(Protocol):
    """Measures one part of each step on the device's own timeline."""

    def start(self) -> None:
        """Mark the beginning of the part."""
        ...

    def stop(self) -> None:
        """Mark its end."""
        ...

    def take(self) -> float | None:
        """Return the seconds between the marks, and forget them; None if unknown. Does not wait."""
        ...


class GpuStopwatch:
    """CUDA events around operations on the current stream."""

    def __init__(self) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._is_complete = False

    def start(self) -> None:
        """Record an event on the current stream."""
        if self._events is None:
            self._events = _make_event(), _make_event()
        self._is_complete = False
        self._events[0].record()

    def stop(self) -> None:
        """Record an event on the current stream."""
        assert self._events is not None
        self._events[1].record()
        self._is_complete = True

    def take(self) -> float | None:
        """Return the device's time between the events if it has passed both."""
        if self._events is None or not self._is_complete or not self._events[1].query():  # type: ignore[no-untyped-call]
            return None
        self._is_complete = False
        return float(self._events[0].elapsed_time(self._events[1])) / 1000.0


def _make_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def device_name(device: torch.device) -> str:
    """Return the name of a GPU as its driver reports it, or the type of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def allows_tf32(device: torch.device) -> bool:
    """Return whether torch may round fp32 to TF32 in matrix products."""
    return device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"


def memory_use(device: torch.device) -> MemoryUse:
    """Return the memory that this rank uses."""
    if device.type == "cuda":
        return MemoryUse(
            torch.cuda.max_memory_allocated(device),
            torch.cuda.max_memory_reserved(device),
            int(torch.cuda.get_device_properties(device).total_memory),
        )
    return MemoryUse(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RESIDENT_UNIT)


class BusyShare:
    """The share of the last moments in which a GPU was busy, as its driver reports it (NVML)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_available = device.type == "cuda"

    def read(self) -> float | None:
        """Return the share; None without a GPU, without the package nvidia-ml-py, or in a part of a GPU (MIG)."""
        if not self._is_available:
            return None
        try:
            return min(1.0, torch.cuda.utilization(self._device) / 100)
        except Exception as error:
            # Each driver raises its own types.
            _LOG.info("the utilization of the GPU is estimated from times: %s", error)
            self._is_available = False
            return None
