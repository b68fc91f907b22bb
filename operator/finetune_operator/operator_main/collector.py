"""Keeps Python's collector of cycles from holding up answers: with a thousand jobs a full collection takes 0.2 s.

Python makes one whenever the number of objects has grown by a quarter, and each beat that is kept counts: with
thousands of supervisors that is every few seconds. Here it is made once in a while, and when memory has really grown.
Reference counts, and the collections of what is young, free nearly everything before.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable
from pathlib import Path

LOOK_SECONDS = 60.0
"""Time between two looks at the memory."""
FULL_SECONDS = 3600.0
"""Longest time between two full collections."""
GROWTH = 1.3
"""Growth of memory since the last full collection that asks for another one."""
NEVER = 1_000_000_000
STATM = Path("/proc/self/statm")


class Collector:
    """Sees to the full collections of this process while it is entered."""

    def __init__(self, loop: asyncio.AbstractEventLoop, resident: Callable[[], int] | None = None) -> None:
        """Take the loop, and a way to ask for the memory of this process in bytes."""
        self._loop = loop
        self._resident = resident or resident_bytes
        self._thresholds = gc.get_threshold()
        self._timer: asyncio.TimerHandle | None = None
        self._collected_at = 0.0
        self._least = 0

    def __enter__(self) -> Collector:
        self._thresholds = gc.get_threshold()
        gc.set_threshold(*self._thresholds[:2], NEVER)
        self._collect()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        gc.set_threshold(*self._thresholds)

    def look(self) -> None:
        """Collect, if it is time for it."""
        grown = self._resident() > GROWTH * self._least
        if grown or self._loop.time() - self._collected_at >= FULL_SECONDS:
            self._collect()
        else:
            self._wait()

    def _collect(self) -> None:
        gc.collect()
        self._collected_at, self._least = self._loop.time(), self._resident()
        self._wait()

    def _wait(self) -> None:
        self._timer = self._loop.call_later(LOOK_SECONDS, self.look)


def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not tell: then only time counts."""
    try:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0
