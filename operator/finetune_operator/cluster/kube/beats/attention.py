"""Records when this process could not receive heartbeats, so that this time does not count as silence of the pods.

It is deaf while it gets no CPU time (another process uses the cores, or it was paused), and while the API server does
not answer who sent a heartbeat.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

from finetune_operator.plan.model.types import DeafPeriod

TICK_SECONDS = 0.25
LATE_SECONDS = 3.0
"""Shortest delay that counts. Shorter ones do not matter for the limits, which are several heartbeats; if they counted,
a machine that is always busy would never detect a silent pod."""
KEPT = timedelta(minutes=10)
"""Age at which a period is dropped: longer than every limit of silence."""


class ListeningClock:
    """The periods in which heartbeats could not be received."""

    def __init__(self, clock: Callable[[], datetime], monotonic: Callable[[], float]) -> None:
        """Create one.

        Args:
            clock: the clock of the heartbeats' times.
            monotonic: the event loop's clock.
        """
        self._clock = clock
        self._monotonic = monotonic
        self._periods: list[DeafPeriod] = []
        self._waiting: list[float] = []
        """Start of each wait that has not ended."""
        self._ticked_at: float | None = None

    async def watch(self) -> None:
        """Detect delays of the event loop until cancelled."""
        while True:
            self.tick()
            await asyncio.sleep(TICK_SECONDS)

    def tick(self) -> None:
        """Record a delay since the last tick."""
        self._record_since(self._expected_at())
        self._ticked_at = self._monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block as deaf if it takes long."""
        started = self._monotonic()
        self._waiting.append(started)
        try:
            yield
        finally:
            self._waiting.remove(started)
            self._record_since(started)

    def record_failure(self, until_seconds: float) -> None:
        """Record that a heartbeat could not be accepted: its sender tries again within this time."""
        now = self._clock()
        self._add(DeafPeriod(now, now + timedelta(seconds=until_seconds)))

    def periods(self) -> tuple[DeafPeriod, ...]:
        """Return the periods, the current one included."""
        started = min((*self._waiting, self._expected_at()))
        self._record_since(started)
        return tuple(self._periods)

    def _expected_at(self) -> float:
        """Return when the next tick was due."""
        return self._ticked_at + TICK_SECONDS if self._ticked_at is not None else self._monotonic()

    def _record_since(self, started: float) -> None:
        seconds = self._monotonic() - started
        if seconds >= LATE_SECONDS:
            now = self._clock()
            self._add(DeafPeriod(now - timedelta(seconds=seconds), now))

    def _add(self, period: DeafPeriod) -> None:
        """Add a period, and merge it with those that it overlaps: no time counts twice."""
        oldest = self._clock() - KEPT
        apart = []
        for known in self._periods:
            if known.until < period.since or period.until < known.since:
                apart.append(known)
            else:
                period = DeafPeriod(min(known.since, period.since), max(known.until, period.until))
        self._periods = [known for known in (*apart, period) if known.until > oldest]
