"""Which jobs want a pass: each at most once at a time, soon, later, or after an error with a growing delay."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

CALM_SHARE = 8
"""Every so many-th pass is a calm one, however many urgent ones wait."""


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


class Lanes(Generic[K]):
    """Pure: who is next. Urgent keys come first, calm ones whenever it is their turn, each lane in its order."""

    def __init__(self) -> None:
        self._urgent: deque[K] = deque()
        self._calm: deque[K] = deque()
        self._is_urgent: dict[K, bool] = {}
        self._turn = 0

    def __len__(self) -> int:
        return len(self._is_urgent)

    def put(self, key: K, *, urgent: bool) -> bool:
        """Put a key in its lane; say whether it is new. One that has become urgent changes lanes."""
        known = self._is_urgent.get(key)
        if known or known is urgent:
            return False
        self._is_urgent[key] = urgent
        # What a calm key leaves in the other lane is passed over when it is met.
        (self._urgent if urgent else self._calm).append(key)
        return known is None

    def pop(self) -> K:
        """Take the next key.

        Raises:
            IndexError: there is none.
        """
        self._turn = (self._turn + 1) % CALM_SHARE
        lanes = (self._calm, self._urgent) if self._turn == 0 else (self._urgent, self._calm)
        for lane in lanes:
            while lane:
                key = lane.popleft()
                if self._is_urgent.get(key) is (lane is self._urgent):
                    del self._is_urgent[key]
                    return key
        raise IndexError


class WorkQueue(Generic[K]):
    """Keys whose jobs want a pass.

    A key that is asked for while its pass is under way comes again after it. A pass sees everything, so it takes the
    place of whatever was asked for before it began, later passes included.
    """

    def __init__(self) -> None:
        self._ready: Lanes[K] = Lanes()
        self._num_ready = asyncio.Semaphore(0)
        self._again: dict[K, bool] = {}
        """Keys that are to come again after the pass that is under way, and whether that is urgent."""
        self._working: set[K] = set()
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._closed = False

    @property
    def depth(self) -> int:
        """Number of keys that wait for a pass."""
        return len(self._ready) + len(self._again)

    def add(self, key: K, *, urgent: bool = True) -> None:
        """Ask for a pass now."""
        if self._closed:
            return
        if key in self._working:
            self._again[key] = urgent or self._again.get(key, False)
        elif self._ready.put(key, urgent=urgent):
            self._num_ready.release()

    def add_after(self, key: K, seconds: float) -> None:
        """Ask for a pass in a while, a calm one; an earlier wish stays."""
        if self._closed:
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
        await self._num_ready.acquire()
        if self._closed:
            # For the next one that asks.
            self._num_ready.release()
            return None
        key = self._ready.pop()
        self._working.add(key)
        if timer := self._timers.pop(key, None):
            timer.cancel()
        return key

    def done(self, key: K) -> None:
        """A pass is over."""
        self._working.discard(key)
        urgent = self._again.pop(key, None)
        if urgent is not None:
            self.add(key, urgent=urgent)

    def close(self) -> None:
        """Hand out no more keys."""
        self._closed = True
        self._num_ready.release()
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _ring(self, key: K) -> None:
        self._timers.pop(key, None)
        self.add(key, urgent=False)
