"""How often mere progress may be written into statuses. Pure: the time is handed in.

Every watcher of FineTuneJobs pays for a status write, etcd most of all, so there is a bound for the whole operator,
and one for each job. What begins or ends something does not wait for it.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class ProgressThrottle(Generic[K]):
    """A least distance from each key's last write, and a token bucket for all of them together."""

    def __init__(self, seconds_per_key: float, writes_per_second: float, burst: float) -> None:
        self._seconds = seconds_per_key
        self._rate = writes_per_second
        self._burst = burst
        self._tokens = burst
        self._filled_at = 0.0
        self._written_at: dict[K, float] = {}
        self._reserved: dict[K, float] = {}

    def wrote(self, key: K, now: float) -> None:
        """A status was written, for whatever reason: the progress until now is in it."""
        self._written_at[key] = now
        self._reserved.pop(key, None)

    def delay(self, key: K, now: float) -> float:
        """In how many seconds a key's progress may be written; 0: now.

        A key whose own distance is kept and that waits for the bucket has its place there until it writes.
        """
        moment = self._reserved.get(key)
        if moment is None:
            wait = self._written_at.get(key, now - self._seconds) + self._seconds - now
            if wait > 0:
                return wait
            moment = self._reserved[key] = self._take_token(now)
        return max(0.0, moment - now)

    def forget(self, key: K) -> None:
        """Drop what is kept of a key."""
        self._written_at.pop(key, None)
        self._reserved.pop(key, None)

    def _take_token(self, now: float) -> float:
        """Take a token; say when it is there. The bucket may owe: then the moment lies ahead."""
        self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._rate)
        self._filled_at = now
        self._tokens -= 1.0
        return now if self._tokens >= 0 else now - self._tokens / self._rate
