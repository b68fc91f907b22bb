"""How often mere progress may be written into statuses. Pure: the time is handed in.

Every watcher of FineTuneJobs pays for a status write, etcd most of all, so there is a bound for the whole operator,
and one for each job. What begins or ends something does not come here.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class ProgressThrottle(Generic[K]):
    """A least distance in time for each key, and a token bucket for all of them together."""

    def __init__(self, seconds_per_key: float, writes_per_second: float, burst: float) -> None:
        self._seconds = seconds_per_key
        self._rate = writes_per_second
        self._burst = burst
        self._tokens = burst
        self._filled_at = 0.0
        self._due: dict[K, float] = {}

    def delay(self, key: K, now: float) -> float:
        """Reserve the next write of a key's progress; say in how many seconds it may happen.

        Asked again before that, it answers with the same moment.
        """
        due = self._due.get(key)
        if due is not None and due > now:
            return due - now
        earliest = now if due is None else max(now, due + self._seconds)
        self._due[key] = max(earliest, self._take_token(now))
        return self._due[key] - now

    def forget(self, key: K) -> None:
        """Drop what is kept of a key."""
        self._due.pop(key, None)

    def _take_token(self, now: float) -> float:
        """Take a token; say when it is there. The bucket may owe: then the moment lies ahead."""
        self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._rate)
        self._filled_at = now
        self._tokens -= 1.0
        return now if self._tokens >= 0 else now - self._tokens / self._rate
