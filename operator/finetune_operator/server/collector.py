"""Keeps Python's collector of cycles from holding up answers.

Python counts allocations less what is freed, and looks at its young objects when that is high. Thousands of supervisors
beat here, and each beat that is kept replaces one that is freed: the count stays low while the young objects pile up,
and the look at them takes 0.1 s when it comes at last. A collection of everything takes 0.6 s. So young objects are
looked at by the clock, and everything only when memory has really grown, or once in a long while.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable
from pathlib import Path

YOUNG_SECONDS = 0.05
"""Time between two looks at the youngest objects."""
LOOKS_OF_YOUNG = 10
"""Every so many of them look at the next older ones too."""
LOOK_SECONDS = 60.0
"""Time between two looks at the memory."""
FULL_SECONDS = 3600.0
"""Longest time between two full collections."""
GROWTH_BYTES = 256 << 20
"""Growth of memory that asks for another full collection: more than the supervisors of 1,000 jobs take."""
NEVER = 1_000_000_000
STATM = Path("/proc/self/statm")


class Collector:
    """Sees to the collections of this process while it is entered."""

    def __init__(self, loop: asyncio.AbstractEventLoop, resident: Callable[[], int] | None = None) -> None:
        """Take the loop, and a way to ask for the memory of this process in bytes."""
        self._loop = loop
        self._resident = resident or resident_bytes
        self._thresholds = gc.get_threshold()
        self._timers: dict[Callable[[], None], asyncio.TimerHandle] = {}
        self._num_looks = 0
        self._collected_at = 0.0
        self._least = 0

    def __enter__(self) -> Collector:
        self._thresholds = gc.get_threshold()
        gc.set_threshold(*self._thresholds[:2], NEVER)
        self._collect()
        self._again(self.look_at_young, YOUNG_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        for timer in self._timers.values():
            timer.cancel()
        gc.set_threshold(*self._thresholds)

    def look_at_young(self) -> None:
        """Collect what was made since the last look; now and then what was made since ten looks."""
        self._num_looks += 1
        gc.collect(1 if self._num_looks % LOOKS_OF_YOUNG == 0 else 0)
        self._again(self.look_at_young, YOUNG_SECONDS)

    def look_at_memory(self) -> None:
        """Collect everything, if it is time for that."""
        grown = self._resident() - self._least >= GROWTH_BYTES
        if grown or self._loop.time() - self._collected_at >= FULL_SECONDS:
            self._collect()
        else:
            self._again(self.look_at_memory, LOOK_SECONDS)

    def _collect(self) -> None:
        gc.collect()
        self._collected_at, self._least = self._loop.time(), self._resident()
        self._again(self.look_at_memory, LOOK_SECONDS)

    def _again(self, look: Callable[[], None], seconds: float) -> None:
        self._timers[look] = self._loop.call_later(seconds, look)


def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not tell: then only time counts."""
    try:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0
