"""Counts the requests to stop that arrive as signals. `drive` uses it; the clock is a parameter.

`timeout` sends a signal to its child and then to the child's process group, and so do some terminals and service
managers: one request arrives twice.
"""

from __future__ import annotations

from collections.abc import Callable

REPEAT_SECONDS = 1.0
"""A signal that follows the previous one within this time belongs to the same request."""


class StopRequests:
    """The requests to stop so far.

    Args:
        clock: monotonic time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last: float | None = None

    def is_new(self) -> bool:
        """Record a signal, and return whether it is a new request instead of a repetition of the previous one."""
        now = self._clock()
        is_new = self._last is None or now - self._last >= REPEAT_SECONDS
        if is_new:
            self._last = now
        return is_new
