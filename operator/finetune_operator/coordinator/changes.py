"""Wakes requests that wait for a change of their job, so that a pod receives its new world without asking again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

JobName = tuple[str, str]
"""Namespace and name of a job."""


class JobChanges:
    """The jobs whose next change a request waits for.

    Args:
        hold_seconds: longest time for which a reply may be held now; a pod that is silent for longer counts as lost.
    """

    def __init__(self, hold_seconds: Callable[[], float]) -> None:
        self.hold_seconds = hold_seconds
        self._waiting: dict[JobName, set[asyncio.Event]] = {}
        self._closed = False

    @property
    def closed(self) -> bool:
        """Return whether nobody may wait any longer."""
        return self._closed

    def __len__(self) -> int:
        return len(self._waiting)

    async def wait(self, job: JobName, seconds: float) -> None:
        """Wait until a job changes, at most for this time."""
        if self._closed:
            return
        event, waiting = asyncio.Event(), self._waiting.setdefault(job, set())
        waiting.add(event)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await event.wait()
        finally:
            waiting.discard(event)
            if not waiting and self._waiting.get(job) is waiting:
                del self._waiting[job]

    def notify(self, job: JobName) -> None:
        """Wake all that wait for a change of a job."""
        for event in self._waiting.pop(job, ()):
            event.set()

    def close(self) -> None:
        """Wake all that wait, and let nobody wait again."""
        self._closed = True
        for job in list(self._waiting):
            self.notify(job)
