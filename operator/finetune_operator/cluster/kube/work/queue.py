"""The work queue: at most one reconcile per job at a time, started now, later, or with a delay after an error."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

LOW_PRIORITY_SHARE = 8
"""One reconcile in N serves the low-priority lane, even while urgent jobs wait."""
LOW_PRIORITY_SECONDS = 10.0
"""Time for which a low-priority key waits before it gets such a turn: its reconcile may only report progress."""


class Backoff(Generic[K]):
    """Delays after consecutive errors of a key. Pure."""

    def __init__(self, first_seconds: float, max_seconds: float) -> None:
        self._first = first_seconds
        self._max = max_seconds
        self._errors: dict[K, int] = {}

    def next_seconds(self, key: K) -> float:
        """Count an error and return the delay before the next attempt."""
        errors = self._errors.get(key, 0)
        self._errors[key] = errors + 1
        # The exponent is bounded, so that it does not overflow after years of errors.
        return min(self._first * 2.0 ** min(errors, 32), self._max)

    def forget(self, key: K) -> None:
        """Reset the count after a success."""
        self._errors.pop(key, None)


class PriorityLanes(Generic[K]):
    """Order of the waiting keys. Pure: the time is a parameter.

    Urgent keys come first. One in N is a low-priority key that has waited for long. First in, first out.
    """

    def __init__(self) -> None:
        self._urgent: deque[tuple[K, float]] = deque()
        self._low: deque[tuple[K, float]] = deque()
        self._is_urgent: dict[K, bool] = {}
        self._num_urgent = 0
        self._turn = 0

    def __len__(self) -> int:
        return len(self._is_urgent)

    @property
    def num_urgent(self) -> int:
        """Number of waiting urgent keys."""
        return self._num_urgent

    def put(self, key: K, now: float, *, urgent: bool, first: bool = False) -> bool:
        """Add a key, or move it to the urgent lane; return whether it was not waiting before.

        first: put an urgent key before the others.
        """
        known = self._is_urgent.get(key)
        if known or known is urgent:
            return False
        self._is_urgent[key] = urgent
        self._num_urgent += urgent
        # A key that changes lanes stays in the low-priority lane, where `pop` skips it.
        if urgent and first:
            self._urgent.appendleft((key, now))
        else:
            (self._urgent if urgent else self._low).append((key, now))
        return known is None

    def pop(self, now: float) -> tuple[K, bool]:
        """Remove the next key; return it, and whether it is urgent.

        Raises:
            IndexError: no key waits.
        """
        self._turn = (self._turn + 1) % LOW_PRIORITY_SHARE
        for lane in (self._low, self._urgent) if self._turn == 0 and self._is_late(now) else (self._urgent, self._low):
            while lane:
                key, _ = lane.popleft()
                if self._is_urgent.get(key) is (lane is self._urgent):
                    urgent = self._is_urgent.pop(key)
                    self._num_urgent -= urgent
                    return key, urgent
        raise IndexError

    def _is_late(self, now: float) -> bool:
        """Return whether the first low-priority key has waited for long."""
        while self._low and self._is_urgent.get(self._low[0][0]) is not False:
            self._low.popleft()
        return bool(self._low) and now - self._low[0][1] >= LOW_PRIORITY_SECONDS


class WorkQueue(Generic[K]):
    """Keys of the jobs to reconcile.

    A key that is added while it is being reconciled is returned again afterwards. A reconcile reads the complete state,
    so it replaces all requests that were made before it started, including delayed ones.

    A reconcile that writes the begin of an attempt requests the next one, which creates its pods. So an urgent request
    during a reconcile is served before the other keys, but only every second time: in a burst, the first jobs begin
    early, and a job that requests reconciles without an end delays the others only once.
    """

    def __init__(self) -> None:
        self._ready: PriorityLanes[K] = PriorityLanes()
        self._num_ready = asyncio.Semaphore(0)
        self._requeued: dict[K, bool] = {}
        """Keys to return again after their running reconcile, and whether that is urgent."""
        self._working: dict[K, bool] = {}
        """Keys whose reconcile is running, and whether it is urgent."""
        self._num_urgent_running = 0
        self._continued: set[K] = set()
        """Keys that were or will be returned before the others, because their reconcile requested another one."""
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._held_until: dict[K, float] = {}
        """End of the back-off of each key, by the event loop's clock."""
        self._closed = False

    @property
    def depth(self) -> int:
        """Number of waiting keys."""
        return len(self._ready) + len(self._requeued)

    @property
    def num_urgent(self) -> int:
        """Number of urgent keys that wait or whose reconcile is running."""
        return self._ready.num_urgent + self._num_urgent_running

    def add(self, key: K, *, urgent: bool = True) -> None:
        """Request a reconcile now."""
        if self._closed:
            return
        if key in self._working:
            self._requeued[key] = urgent or self._requeued.get(key, False)
        else:
            self._put(key, urgent=urgent)

    def add_after(self, key: K, seconds: float) -> None:
        """Request a low-priority reconcile after a delay, or after the key's back-off, unless an earlier one is due."""
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        due = max(loop.time() + max(0.0, seconds), self._held_until.get(key, 0.0))
        timer = self._timers.get(key)
        if timer is not None and timer.when() <= due:
            return
        if timer is not None:
            timer.cancel()
        self._timers[key] = loop.call_at(due, self._timer_fired, key)

    def hold(self, key: K, seconds: float) -> None:
        """Retry a key whose reconcile has failed after a delay; until then, low-priority requests do not start one.

        Urgent requests still do: something has ended, or a user has edited the job.
        """
        if (timer := self._timers.pop(key, None)) is not None:
            timer.cancel()
        self._held_until[key] = asyncio.get_running_loop().time() + seconds
        self.add_after(key, seconds)

    async def get(self) -> K | None:
        """Wait for the next key; its reconcile is running until `done`. Return None if the queue is closed."""
        await self._num_ready.acquire()
        if self._closed:
            # Wakes the next waiting worker.
            self._num_ready.release()
            return None
        key, urgent = self._ready.pop(asyncio.get_running_loop().time())
        self._working[key] = urgent
        self._num_urgent_running += urgent
        self._held_until.pop(key, None)
        if timer := self._timers.pop(key, None):
            timer.cancel()
        return key

    def done(self, key: K) -> None:
        """Record that the reconcile of a key has ended."""
        self._num_urgent_running -= self._working.pop(key, False)
        urgent = self._requeued.pop(key, None)
        has_continued = key in self._continued
        self._continued.discard(key)
        if self._closed or urgent is None or (not urgent and key in self._held_until):
            return
        if urgent and not has_continued:
            self._continued.add(key)
        self._put(key, urgent=urgent, first=not has_continued)

    def close(self) -> None:
        """Return no more keys."""
        self._closed = True
        self._num_ready.release()
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _put(self, key: K, *, urgent: bool, first: bool = False) -> None:
        if self._ready.put(key, asyncio.get_running_loop().time(), urgent=urgent, first=first):
            self._num_ready.release()

    def _timer_fired(self, key: K) -> None:
        self._timers.pop(key, None)
        self.add(key, urgent=False)
