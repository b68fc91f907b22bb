"""The API server's time. All times in objects are its, so the operator compares them with nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

TOLERANCE = timedelta(seconds=2)
"""The Date header has whole seconds, and answers take a while: less than this is no difference."""
LISTEN_SECONDS = 10.0
"""Time between two looks at the header."""


class ServerClock:
    """This machine's clock, moved to the API server's where the two are apart."""

    def __init__(
        self, wall: Callable[[], datetime] | None = None, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._wall = wall or _utc_now
        self._monotonic = monotonic
        self._listen_at = 0.0
        self.offset = timedelta(0)
        """What is added to this machine's time."""

    def __call__(self) -> datetime:
        """Now, by the API server's clock."""
        return self._wall() + self.offset

    def hear(self, date: str | None) -> None:
        """Take the Date header of an answer that has just come."""
        if date is None or self._monotonic() < self._listen_at:
            return
        self._listen_at = self._monotonic() + LISTEN_SECONDS
        try:
            server = parsedate_to_datetime(date)
        except ValueError:
            return
        if abs(server - self()) > TOLERANCE:
            self.offset = server - self._wall()


def _utc_now() -> datetime:
    return datetime.now(UTC)
