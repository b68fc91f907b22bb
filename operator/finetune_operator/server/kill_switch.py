"""For crash tests: kills the process, as SIGKILL does, directly before or after its n-th write to the API server.

Set FINETUNE_TEST_KILL_AT, for example to before:3 or after:7. As in any crash, only what is in the status remains.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "FINETUNE_TEST_KILL_AT"
UNCOUNTED = ("/leases", "/tokenreviews", "/events")
"""Writes that do not affect any decision."""


class KillSwitch:
    """A request hook that kills the process."""

    def __init__(self, where: str) -> None:
        """Parse `before:N` or `after:N`; N starts at 1.

        Raises:
            ValueError: the value has another form.
        """
        self._when, _, number = where.partition(":")
        self._left = int(number)
        if self._when not in ("before", "after") or self._left < 1:
            raise ValueError(f"{VARIABLE}={where}: write before:N or after:N with N >= 1")

    def before(self, method: str, path: str) -> None:
        """Count a write; kill the process if it is the n-th one."""
        if self._counts(method, path):
            self._left -= 1
            if self._left == 0 and self._when == "before":
                os.kill(os.getpid(), signal.SIGKILL)

    def after(self, method: str, path: str, status: int, seconds: float) -> None:
        """Kill the process if the write that was counted last is the n-th one."""
        del status, seconds
        if self._counts(method, path) and self._left <= 0 and self._when == "after":
            os.kill(os.getpid(), signal.SIGKILL)

    @staticmethod
    def _counts(method: str, path: str) -> bool:
        return method not in ("GET", "WATCH") and not any(part in path for part in UNCOUNTED)
