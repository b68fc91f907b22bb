"""Interval between heartbeats: it grows with the number of pods. Pure: the time is a parameter."""

from __future__ import annotations

from finetune_operator.plan.model.listening import SILENT_BEATS
from finetune_operator.settings import Settings

WAITING_SHARE = 0.25
"""Share of the heartbeat rate that is available to pods that wait for a new world and send more often."""
BUSY_SHARE = 0.25
"""Share of the heartbeat rate that is used while jobs wait for a reconcile: recovery comes before progress."""
MAX_WAITING_SECONDS = 10.0
"""Longest interval of a pod that waits for a new world, and whose reply is not held: its ranks start only after its
next heartbeat."""
MARGIN_SECONDS = 2.0
"""Delay with which such a heartbeat may arrive."""
HELD_BEATS = 2.0
"""Time for which a reply may be held, in heartbeats: less than `SILENT_BEATS`."""


class HeartbeatInterval:
    """The interval that is requested now, and the longest one that a pod may still use."""

    def __init__(self, settings: Settings, beats_per_second: float) -> None:
        self._shortest = settings.beat_seconds
        # Short enough that a pod is not reported as silent.
        self._longest = max(self._shortest, settings.beat_timeout_seconds / SILENT_BEATS)
        self._rate = beats_per_second
        self._requested = self._shortest
        self._previous = 0.0
        self._previous_until = 0.0

    def choose_seconds(self, num_pods: int, now: float, *, busy: bool = False) -> float:
        """Return the seconds between two heartbeats of each of `num_pods` pods; busy: more important work waits."""
        rate = self._rate * (BUSY_SHARE if busy else 1.0)
        requested = round(min(max(self._shortest, num_pods / rate), self._longest), 1)
        if requested < self._requested:
            # Pods use the longer interval until their next heartbeat is answered.
            self._previous = max(self._requested, self.longest_seconds(now))
            self._previous_until = now + self._previous + MARGIN_SECONDS
        self._requested = requested
        return requested

    def choose_waiting_seconds(self, seconds: float, num_waiting: int) -> float:
        """Return the seconds between two heartbeats of each of `num_waiting` waiting pods, at least `seconds`.

        If a thousand jobs lose a pod at the same time, the heartbeats of the other pods must not delay the reconciles.
        """
        return max(seconds, min(round(num_waiting / (WAITING_SHARE * self._rate), 1), MAX_WAITING_SECONDS))

    def hold_seconds(self) -> float:
        """Return the time for which a reply to a pod without ranks may be held, so that the pod does not count as lost.

        The pod asks again only then, and receives its new world without asking.
        """
        return max(self._requested, min(HELD_BEATS * self._shortest, self._longest))

    def longest_seconds(self, now: float) -> float:
        """Return the longest interval that a pod may use now; a pod that is silent for much longer is lost."""
        return max(self._requested, self._previous) if now < self._previous_until else self._requested
