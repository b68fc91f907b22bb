"""Keeps Python's collector of cycles from holding up answers: with a thousand jobs a full collection takes 0.2 s.

What a long collection found alive is set aside, so that the next one looks at newer objects only. Reference counts
still free it. Cycles among it that die later are found once in a while, when all is looked at again.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

LONG_SECONDS = 0.02
"""A collection that takes longer than this is noticed by those who wait for an answer."""
FULL_SECONDS = 3600.0
"""Time between two looks at everything."""
OLDEST = 2
"""The generation whose collection looks at all."""


class Collector:
    """Watches the collections of this process while it is entered."""

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float] = time.perf_counter) -> None:
        self._loop = loop
        self._clock = clock
        self._began_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Collector:
        gc.callbacks.append(self.see)
        self._timer = self._loop.call_later(FULL_SECONDS, self._look_at_all)
        return self

    def __exit__(self, *_: object) -> None:
        gc.callbacks.remove(self.see)
        if self._timer is not None:
            self._timer.cancel()

    def see(self, phase: str, info: dict[str, int]) -> None:
        """Told by `gc` of the start and the stop of each collection."""
        if info["generation"] != OLDEST:
            return
        if phase == "start":
            self._began_at = self._clock()
        elif self._clock() - self._began_at > LONG_SECONDS:
            # Not from here: the collection is not quite over.
            self._loop.call_soon_threadsafe(gc.freeze)

    def _look_at_all(self) -> None:
        gc.unfreeze()
        gc.collect()
        self._timer = self._loop.call_later(FULL_SECONDS, self._look_at_all)
