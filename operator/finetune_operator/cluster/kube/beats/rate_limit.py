"""Rate limit of requests per sender. Pure: the time is a parameter."""

from __future__ import annotations

from typing import NamedTuple


class _Bucket(NamedTuple):
    tokens: float
    at: float


class RateLimit:
    """A token bucket per sender. Senders whose bucket must be full again are dropped."""

    def __init__(self, per_second: float, burst: float, max_senders: int = 20_000) -> None:
        self._rate = per_second
        self._burst = burst
        self._max_senders = max_senders
        self._buckets: dict[str, _Bucket] = {}

    def allow(self, sender: str, now: float) -> bool:
        """Take one of a sender's tokens; return False if none is left."""
        tokens, at = self._buckets.get(sender, _Bucket(self._burst, now))
        tokens = min(self._burst, tokens + (now - at) * self._rate)
        if len(self._buckets) >= self._max_senders:
            self._drop_full(now)
        self._buckets[sender] = _Bucket(max(0.0, tokens - 1.0), now)
        return tokens >= 1.0

    def _drop_full(self, now: float) -> None:
        full_after = self._burst / self._rate
        self._buckets = {key: bucket for key, bucket in self._buckets.items() if now - bucket.at < full_after}
