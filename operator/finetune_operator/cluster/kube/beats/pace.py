"""How often supervisors are asked to beat: less often the more of them there are. Pure: the time is handed in."""

from __future__ import annotations

from finetune_operator.plan.policies.nodes import SILENT_BEATS
from finetune_operator.settings import Settings

WAITING_SHARE = 0.25
"""Of all beats that are asked for, those of pods that wait and therefore beat more often."""


class BeatPace:
    """The interval that is asked for, and the one that a pod may still keep that was asked before."""

    def __init__(self, settings: Settings, beats_per_second: float) -> None:
        self._shortest = settings.beat_seconds
        # Never so long that a pod would look silent.
        self._longest = max(self._shortest, settings.beat_timeout_seconds / SILENT_BEATS)
        self._rate = beats_per_second
        self._asked = self._shortest
        self._kept = 0.0
        self._kept_until = 0.0

    def ask(self, num_pods: int, now: float) -> float:
        """Seconds between two beats for each of so many pods."""
        asked = round(min(max(self._shortest, num_pods / self._rate), self._longest), 1)
        if asked < self._asked:
            # Who was asked before keeps to that until its next beat.
            self._kept = max(self._asked, self.expected(now))
            self._kept_until = now + self._kept
        self._asked = asked
        return asked

    def hurry(self, seconds: float, num_waiting: int) -> float:
        """Seconds between two beats of each of so many pods that would beat every so many seconds while they wait.

        When a thousand jobs lose a pod at a time, their passes must not wait for the beats of all the other pods.
        """
        return max(seconds, round(num_waiting / (WAITING_SHARE * self._rate), 1))

    def expected(self, now: float) -> float:
        """The longest interval that a pod may keep to now: what is silent for much longer is silent."""
        return max(self._asked, self._kept) if now < self._kept_until else self._asked
