"""Schedules Python's cyclic garbage collection, so that it does not delay replies.

Python counts allocations minus deallocations, and collects young objects when the count is high. Thousands of
supervisors send heartbeats, and each stored heartbeat replaces one that is freed: the count stays low while young
objects accumulate, and the collection that finally runs takes 0.1 s. A full collection takes 0.6 s. So young objects
are collected at a fixed interval, and everything only when memory has grown, or after a long time.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable
from pathlib import Path

YOUNG_SECONDS = 0.05
"""Interval between two collections of the youngest objects."""
YOUNG_PER_MIDDLE = 10
"""One in N of these collections includes the next older generation."""
CHECK_SECONDS = 60.0
"""Interval between two checks of the memory."""
FULL_SECONDS = 3600.0
"""Longest interval between two full collections."""
GROWTH_BYTES = 256 << 20
"""Growth of memory that triggers a full collection: more than the supervisors of 1,000 jobs need."""
NEVER = 1_000_000_000
STATM = Path("/proc/self/statm")


class GarbageCollector:
    """Runs the collections of this process while it is entered as a context manager."""

    def __init__(self, loop: asyncio.AbstractEventLoop, resident: Callable[[], int] | None = None) -> None:
        """Create one for an event loop; `resident` returns this process's memory in bytes."""
        self._loop = loop
        self._resident = resident or resident_bytes
        self._thresholds = gc.get_threshold()
        self._timers: dict[Callable[[], None], asyncio.TimerHandle] = {}
        self._num_young = 0
        self._collected_at = 0.0
        self._least = 0

    def __enter__(self) -> GarbageCollector:
        self._thresholds = gc.get_threshold()
        gc.set_threshold(*self._thresholds[:2], NEVER)
        self._collect()
        self._schedule(self.collect_young, YOUNG_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        for timer in self._timers.values():
            timer.cancel()
        gc.set_threshold(*self._thresholds)

    def collect_young(self) -> None:
        """Collect the youngest generation; one time in N also the next older one."""
        self._num_young += 1
        gc.collect(1 if self._num_young % YOUNG_PER_MIDDLE == 0 else 0)
        self._schedule(self.collect_young, YOUNG_SECONDS)

    def collect_if_grown(self) -> None:
        """Collect everything if memory has grown or the last full collection was long ago."""
        grown = self._resident() - self._least >= GROWTH_BYTES
        if grown or self._loop.time() - self._collected_at >= FULL_SECONDS:
            self._collect()
        else:
            self._schedule(self.collect_if_grown, CHECK_SECONDS)

    def _collect(self) -> None:
        gc.collect()
        self._collected_at, self._least = self._loop.time(), self._resident()
        self._schedule(self.collect_if_grown, CHECK_SECONDS)

    def _schedule(self, collect: Callable[[], None], seconds: float) -> None:
        self._timers[collect] = self._loop.call_later(seconds, collect)


def resident_bytes() -> int:
    """Return this process's memory; 0 if the system does not report it, so that only time triggers collections."""
    try:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0
