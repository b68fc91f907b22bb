"""The API server's time. All timestamps in objects are the server's, so the operator uses its clock only."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

TOLERANCE = timedelta(seconds=2)
"""The Date header has a resolution of one second, and responses take time: smaller differences are ignored."""
SYNC_SECONDS = 10.0
"""Minimum time between two comparisons with the Date header."""


class ServerClock:
    """This machine's clock, corrected to the API server's clock if the two differ."""

    def __init__(
        self, wall: Callable[[], datetime] | None = None, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._wall = wall or _utc_now
        self._monotonic = monotonic
        self._sync_at = 0.0
        self.offset = timedelta(0)
        """Correction added to this machine's time."""

    def __call__(self) -> datetime:
        """Return the current time of the API server's clock."""
        return self._wall() + self.offset

    def sync(self, date: str | None) -> None:
        """Compare with the Date header of a response that has just arrived."""
        if date is None or self._monotonic() < self._sync_at:
            return
        self._sync_at = self._monotonic() + SYNC_SECONDS
        try:
            server = parsedate_to_datetime(date)
        except ValueError:
            return
        if abs(server - self()) > TOLERANCE:
            self.offset = server - self._wall()


def _utc_now() -> datetime:
    return datetime.now(UTC)
