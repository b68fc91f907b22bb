"""What is wrong with the storage, and how long training may go on all the same. Lives on rank 0."""

from __future__ import annotations

from finetune_trainer.errors import StaleError
from finetune_trainer.report import Reporter

SLOW_SECONDS = 120.0
"""A save that takes longer than this is worth a word."""
FIRST_RETRY_SECONDS = 2.0
MAX_RETRY_SECONDS = 60.0


class CheckpointHealth:
    """Since when no checkpoint could be written, and why."""

    def __init__(self, max_stale_seconds: float, reporter: Reporter) -> None:
        self._max_stale_seconds = max_stale_seconds
        self._reporter = reporter
        self._retry_at = 0.0
        self._pause = FIRST_RETRY_SECONDS
        self.text = ""
        """What is wrong; empty: nothing."""

    def note(self, text: str, now: float) -> None:
        """A save has failed: training goes on, and tries again."""
        if not self.text:
            self._reporter.warn(f"{text}; training goes on, and tries again")
        self.text = text
        self._retry_at, self._pause = now + self._pause, min(2 * self._pause, MAX_RETRY_SECONDS)
        self._reporter.checkpoint_error(text)

    def clear(self) -> None:
        """A save has succeeded."""
        self.text, self._pause = "", FIRST_RETRY_SECONDS
        self._reporter.checkpoint_error("")

    def slow(self, step: int, seconds: float, since: float) -> None:
        """A save has been under way for so long.

        Raises:
            StaleError: longer than is allowed.
        """
        if seconds > SLOW_SECONDS:
            text = f"checkpoint storage: the save of step {step} is not done after {SLOW_SECONDS:g} s"
            self._reporter.checkpoint_error(text)
            if self.is_over(since):
                raise StaleError(f"{text}; {self._limit()}")

    def check(self, since: float) -> None:
        """Go on only while no more would be lost than is allowed.

        Raises:
            StaleError: it would be more.
        """
        if self.text and self.is_over(since):
            raise StaleError(self.sentence())

    def retry_due(self, now: float) -> bool:
        """Whether to try again after a failure."""
        return bool(self.text) and now >= self._retry_at

    def is_over(self, since: float) -> bool:
        """Whether the newest checkpoint is older than is allowed."""
        return since > self._max_stale_seconds

    def sentence(self) -> str:
        """Why the job cannot go on."""
        return f"{self.text}; {self._limit()}"

    def _limit(self) -> str:
        return f"no checkpoint for {self._max_stale_seconds:g} s (spec.checkpoint.maxStale)"
