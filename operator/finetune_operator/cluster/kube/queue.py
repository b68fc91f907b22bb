"""Which jobs want a pass: each at most once at a time, soon, later, or after an error with a growing delay."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Backoff(Generic[K]):
    """Pure: how long to wait after each further error of a key."""

    def __init__(self, first_seconds: float, max_seconds: float) -> None:
        self._first = first_seconds
        self._max = max_seconds
        self._errors: dict[K, int] = {}

    def next_seconds(self, key: K) -> float:
        """Count an error; say how long to wait."""
        errors = self._errors.get(key, 0)
        self._errors[key] = errors + 1
        # The exponent is bounded, so that years of errors do not overflow.
        return min(self._first * 2.0 ** min(errors, 32), self._max)

    def forget(self, key: K) -> None:
        """A pass succeeded."""
        self._errors.pop(key, None)


class WorkQueue(Generic[K]):
    """Keys in the order in which they were first asked for.

    A key that is asked for while its pass is under way comes again after it. A pass sees everything, so it takes the
    place of whatever was asked for before it began, later passes included.
    """

    def __init__(self) -> None:
        self._ready: asyncio.Queue[K | None] = asyncio.Queue()
        self._waiting: set[K] = set()
        """Keys in `_ready`, and those that go there when their pass is done."""
        self._working: set[K] = set()
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._closed = False

    @property
    def depth(self) -> int:
        """Number of keys that wait for a pass."""
        return len(self._waiting)

    def add(self, key: K) -> None:
        """Ask for a pass now."""
        if key in self._waiting or self._closed:
            return
        self._waiting.add(key)
        if key not in self._working:
            self._ready.put_nowait(key)

    def add_after(self, key: K, seconds: float) -> None:
        """Ask for a pass in a while; an earlier wish stays."""
        if key in self._waiting or self._closed:
            return
        loop = asyncio.get_running_loop()
        due = loop.time() + max(0.0, seconds)
        timer = self._timers.get(key)
        if timer is not None and timer.when() <= due:
            return
        if timer is not None:
            timer.cancel()
        self._timers[key] = loop.call_at(due, self._ring, key)

    async def get(self) -> K | None:
        """The next key; its pass is under way until `done`. None: the queue is closed."""
        key = await self._ready.get()
        if key is None or self._closed:
            # Left for the next one that asks.
            self._ready.put_nowait(None)
            return None
        self._waiting.discard(key)
        self._working.add(key)
        if timer := self._timers.pop(key, None):
            timer.cancel()
        return key

    def done(self, key: K) -> None:
        """A pass is over."""
        self._working.discard(key)
        if key in self._waiting:
            self._ready.put_nowait(key)

    def close(self) -> None:
        """Hand out no more keys."""
        self._closed = True
        self._ready.put_nowait(None)
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _ring(self, key: K) -> None:
        self._timers.pop(key, None)
        self.add(key)
