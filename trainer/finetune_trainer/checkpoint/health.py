"""Checkpoint health: why saves fail, when to retry, and when training must stop. Used by rank 0 only."""

from __future__ import annotations

from finetune_trainer.errors import StaleError
from finetune_trainer.report import Reporter

SLOW_SECONDS = 120.0
"""A save that takes longer than this is reported."""
FIRST_RETRY_SECONDS = 2.0
MAX_RETRY_SECONDS = 60.0


class CheckpointHealth:
    """Tracks failed saves and the limit `spec.checkpoint.maxStale`."""

    def __init__(self, max_stale_seconds: float, reporter: Reporter) -> None:
        self._max_stale_seconds = max_stale_seconds
        self._reporter = reporter
        self._retry_at = 0.0
        self._pause = FIRST_RETRY_SECONDS
        self.error = ""
        """Reason why the last save failed; empty after a save that succeeded."""

    def record_failure(self, text: str, now: float) -> None:
        """Record a failed save: training continues, and the save is retried with increasing delay."""
        if not self.error:
            self._reporter.warn(f"{text}; training continues, and the save is retried")
        self.error = text
        self._retry_at, self._pause = now + self._pause, min(2 * self._pause, MAX_RETRY_SECONDS)
        self._reporter.checkpoint_error(text)

    def record_success(self) -> None:
        """Record a save that succeeded."""
        self.error, self._pause = "", FIRST_RETRY_SECONDS
        self._reporter.checkpoint_error("")

    def check_running_save(self, step: int, seconds: float, since: float) -> None:
        """Report a slow save, and check the age of the newest checkpoint.

        Args:
            step: step that is being saved.
            seconds: how long the save has been running.
            since: age of the newest checkpoint in seconds.

        Raises:
            StaleError: the newest checkpoint is older than the run allows.
        """
        if seconds > SLOW_SECONDS:
            text = f"checkpoint storage: the save of step {step} is not done after {SLOW_SECONDS:g} s"
            self._reporter.checkpoint_error(text)
            if self.is_stale(since):
                raise StaleError(f"{text}; {self._limit()}")

    def check(self, since: float) -> None:
        """Raise an error if saves fail and the newest checkpoint is too old.

        Args:
            since: age of the newest checkpoint in seconds.

        Raises:
            StaleError: the newest checkpoint is older than the run allows.
        """
        if self.error and self.is_stale(since):
            raise StaleError(self.stale_message())

    def retry_due(self, now: float) -> bool:
        """Return whether to retry a failed save now."""
        return bool(self.error) and now >= self._retry_at

    def is_stale(self, since: float) -> bool:
        """Return whether the newest checkpoint is older than the run allows."""
        return since > self._max_stale_seconds

    def stale_message(self) -> str:
        """Return why training must stop."""
        return f"{self.error}; {self._limit()}"

    def _limit(self) -> str:
        return f"no checkpoint for {self._max_stale_seconds:g} s (spec.checkpoint.maxStale)"
