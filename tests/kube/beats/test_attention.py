"""Periods in which the operator cannot receive heartbeats."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

from finetune_operator.cluster.kube.beats.attention import KEPT, LATE_SECONDS, TICK_SECONDS, ListeningClock
from finetune_operator.plan.model.types import DeafPeriod

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Time:
    """Both clocks of an `ListeningClock`."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.attention = ListeningClock(lambda: NOW + timedelta(seconds=self.seconds), lambda: self.seconds)

    def periods(self) -> list[tuple[float, float]]:
        """Return the periods in seconds since the start."""
        return [(self._seconds(each.since), self._seconds(each.until)) for each in self.attention.periods()]

    @staticmethod
    def _seconds(moment: datetime) -> float:
        return (moment - NOW).total_seconds()


def test_short_delays_do_not_count_and_long_ones_do() -> None:
    time = Time()
    for _ in range(5):
        time.attention.tick()
        time.seconds += TICK_SECONDS + LATE_SECONDS / 2
    assert time.periods() == []
    time.attention.tick()
    started = time.seconds
    time.seconds += 30
    # A reconcile may run before the next tick.
    assert time.periods() == [(started + TICK_SECONDS, started + 30)]
    time.attention.tick()
    time.seconds += TICK_SECONDS
    assert time.periods() == [(started + TICK_SECONDS, started + 30)]


def test_waits_for_the_api_server_count_while_they_last_and_overlapping_ones_once() -> None:
    time = Time()
    with time.attention.waiting():
        time.seconds = 5.0
        with time.attention.waiting():
            time.seconds = 8.0
            assert time.periods() == [(0.0, 8.0)]
    time.seconds = 20.0
    with time.attention.waiting():
        time.seconds += LATE_SECONDS / 2
    assert time.periods() == [(0.0, 8.0)]


def test_a_failed_review_counts_until_the_next_try_and_old_periods_are_dropped() -> None:
    time = Time()
    time.attention.record_failure(30.0)
    time.seconds = 10.0
    time.attention.record_failure(30.0)
    assert time.periods() == [(0.0, 40.0)]
    time.seconds = 40.0 + KEPT.total_seconds() + 1
    time.attention.record_failure(1.0)
    assert time.attention.periods() == (
        DeafPeriod(NOW + timedelta(seconds=time.seconds), NOW + timedelta(seconds=time.seconds + 1)),
    )


def test_a_blocked_event_loop_is_detected() -> None:
    async def test() -> list[tuple[float, float]]:
        watching = asyncio.create_task(time.attention.watch())
        await asyncio.sleep(0)
        time.seconds = 7.0
        await asyncio.sleep(2 * TICK_SECONDS)
        watching.cancel()
        return time.periods()

    time = Time()
    assert asyncio.run(test()) == [(TICK_SECONDS, 7.0)]
