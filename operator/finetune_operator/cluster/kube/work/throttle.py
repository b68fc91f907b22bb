"""Rate limit of progress writes into statuses. Pure: the time is a parameter.

A status write costs every watcher of FineTuneJobs, and etcd most of all. So there is a limit for the operator and one
for each job. Status changes that start or end something are not limited.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

BUSY_FACTOR = 6.0
"""Factor of the interval between two writes of a key while more important work waits."""


class ProgressThrottle(Generic[K]):
    """A minimum interval between the writes of each key, and a token bucket for the writes of all keys."""

    def __init__(self, seconds_per_key: float, writes_per_second: float, burst: float) -> None:
        self._seconds = seconds_per_key
        self._rate = writes_per_second
        self._burst = burst
        self._tokens = burst
        self._filled_at = 0.0
        self._written_at: dict[K, float] = {}
        self._reserved: dict[K, float] = {}

    def record_write(self, key: K, now: float) -> None:
        """Record that a status was written for any reason: it contains the progress until now."""
        self._written_at[key] = now
        self._reserved.pop(key, None)

    def delay(self, key: K, now: float, *, busy: bool = False) -> float:
        """Return the seconds until a key's progress may be written; 0 means now.

        A key that only waits for the bucket keeps its reserved token until it writes.

        Args:
            key: the key.
            now: the current time in seconds.
            busy: whether more important work waits.
        """
        seconds = self._seconds * (BUSY_FACTOR if busy else 1.0)
        moment = self._reserved.get(key)
        if moment is None:
            wait = self._written_at.get(key, now - seconds) + seconds - now
            if wait > 0:
                return wait
            moment = self._reserved[key] = self._take_token(now)
        return max(0.0, moment - now)

    def forget(self, key: K) -> None:
        """Drop the state of a key."""
        self._written_at.pop(key, None)
        self._reserved.pop(key, None)

    def _take_token(self, now: float) -> float:
        """Take a token and return when it is available. The bucket may go negative: then that is in the future."""
        self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._rate)
        self._filled_at = now
        self._tokens -= 1.0
        return now if self._tokens >= 0 else now - self._tokens / self._rate
