"""Stand-in for NVML (the module pynvml of nvidia-ml-py) on a machine without GPUs. Nothing here talks to a driver.

It has the functions that `supervisor.gpu_faults` calls, with their names and errors. A test puts events into a driver;
a process reads them from the file that FAKE_NVML_EVENTS names: one JSON list [GPU, XID or null] per line.
"""

from __future__ import annotations

import json
import os
import queue
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NVML_ERROR_TIMEOUT = 10
nvmlEventTypeXidCriticalError = 8  # noqa: N816  names of the library
nvmlEventTypeDoubleBitEccError = 2  # noqa: N816
EVENTS_FILE = "FAKE_NVML_EVENTS"


class NVMLError(Exception):
    """Error of the library, with its number."""

    def __init__(self, value: int) -> None:
        super().__init__(f"error {value}")
        self.value = value


@dataclass
class Driver:
    """The driver of the stand-in: its GPUs, and events that were not received yet."""

    num_gpus: int = 2
    supports_events: bool = True
    is_installed: bool = True
    lost: set[int] = field(default_factory=set)
    """GPUs that no longer answer."""
    events: queue.Queue[tuple[int, int | None]] = field(default_factory=queue.Queue)
    num_read: int = 0
    """Lines of the file that were read."""


@dataclass(frozen=True)
class EventData:
    """An event, as the library returns it."""

    device: int
    eventType: int  # noqa: N815  names of the library
    eventData: int  # noqa: N815


driver = Driver()


def nvmlInit() -> None:  # noqa: N802
    """Raise an error if there is no driver."""
    if not driver.is_installed:
        raise NVMLError(12)


def nvmlDeviceGetCount() -> int:  # noqa: N802
    """Return the number of GPUs."""
    return driver.num_gpus


def nvmlDeviceGetHandleByIndex(index: int) -> int:  # noqa: N802
    """Return the handle of a GPU."""
    return index


def nvmlDeviceGetUUID(handle: int) -> bytes:  # noqa: N802
    """Return the UUID of a GPU."""
    if handle in driver.lost:
        raise NVMLError(15)
    return f"GPU-fake-{handle}".encode()


def nvmlEventSetCreate() -> list[int]:  # noqa: N802
    """Return a set of GPUs whose events are received from now on: those before it are over, as in the library."""
    driver.num_read = len(_lines())
    return []


def nvmlDeviceGetSupportedEventTypes(handle: int) -> int:  # noqa: N802
    """Return the kinds of events that a GPU sends."""
    del handle
    return 0xFF if driver.supports_events else 0


def nvmlDeviceRegisterEvents(handle: int, types: int, events: list[int]) -> None:  # noqa: N802
    """Receive events of a GPU."""
    del types
    events.append(handle)


def nvmlEventSetWait_v2(events: list[int], milliseconds: int) -> Any:  # noqa: N802
    """Return the next event.

    Raises:
        NVMLError: there is none within the time.
    """
    deadline = time.monotonic() + milliseconds / 1000
    while time.monotonic() < deadline:
        _read_file()
        try:
            gpu, xid = driver.events.get(timeout=0.05)
        except queue.Empty:
            continue
        if gpu in events:
            kind = nvmlEventTypeDoubleBitEccError if xid is None else nvmlEventTypeXidCriticalError
            return EventData(gpu, kind, xid or 0)
    raise NVMLError(NVML_ERROR_TIMEOUT)


def _read_file() -> None:
    lines = _lines()
    for line in lines[driver.num_read :]:
        gpu, xid = json.loads(line)
        driver.events.put((gpu, xid))
    driver.num_read = len(lines)


def _lines() -> list[str]:
    path = os.environ.get(EVENTS_FILE)
    return Path(path).read_text(encoding="utf-8").splitlines() if path and Path(path).is_file() else []
