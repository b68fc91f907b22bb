"""Summary of a profile: the kernels that took the most time, launches per step, utilisation of the device. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
"""Starts of the names of calls that put work on a stream. The replay of a graph is one call."""
_NAME_LENGTH = 120
NUM_TOP = 15


@dataclass(frozen=True)
class TraceEvent:
    """One event of a profile.

    Attributes:
        name: kernel, runtime call or operation.
        on_device: whether it ran on the device.
        start: start in nanoseconds.
        duration: duration in nanoseconds.
    """

    name: str
    on_device: bool
    start: int
    duration: int


def summarize(events: Sequence[TraceEvent], num_steps: int, step_seconds: float) -> dict[str, Any]:
    """Return the figures of a profile.

    The profiler slows the host down, so the utilisation relates the busy time of the device to a step that was timed
    without it.

    Args:
        events: all events of the profiled steps.
        num_steps: number of profiled steps.
        step_seconds: duration of a step without the profiler.
    """
    on_device = [event for event in events if event.on_device]
    calls = [event for event in events if not event.on_device]
    busy = busy_nanoseconds(on_device) / 1e9 / num_steps
    return {
        "top": top(on_device or [event for event in calls if event.name.startswith("aten::")], num_steps),
        "kernels_per_step": len(on_device) / num_steps,
        "launches_per_step": sum(event.name.startswith(_LAUNCHES) for event in calls) / num_steps,
        "device_busy_seconds_per_step": busy if on_device else None,
        "device_utilisation": min(1.0, busy / step_seconds) if on_device else None,
    }


def busy_nanoseconds(events: Iterable[TraceEvent]) -> int:
    """Return the time in which at least one event ran: kernels of several streams overlap."""
    total, end = 0, 0
    for event in sorted(events, key=lambda event: event.start):
        total += max(0, event.start + event.duration - max(end, event.start))
        end = max(end, event.start + event.duration)
    return total


def top(events: Iterable[TraceEvent], num_steps: int, number: int = NUM_TOP) -> list[dict[str, Any]]:
    """Return the names with the largest total time: milliseconds and calls per step, and the share of all events."""
    nanoseconds: dict[str, int] = defaultdict(int)
    calls: dict[str, int] = defaultdict(int)
    for event in events:
        nanoseconds[event.name] += event.duration
        calls[event.name] += 1
    total = sum(nanoseconds.values()) or 1
    return [
        {
            "name": name[:_NAME_LENGTH],
            "milliseconds": round(nanoseconds[name] / 1e6 / num_steps, 3),
            "calls": calls[name] / num_steps,
            "share": round(nanoseconds[name] / total, 4),
        }
        for name in sorted(nanoseconds, key=lambda name: -nanoseconds[name])[:number]
    ]
