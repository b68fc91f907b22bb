"""For the tests of crashes: ends the process, as SIGKILL does, right before or after its n-th write to the API server.

Set FINETUNE_TEST_KILL_AT, e.g. to before:3 or after:7. What is not in the status then is lost, as in any other crash.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "FINETUNE_TEST_KILL_AT"
UNCOUNTED = ("/leases", "/tokenreviews", "/events")
"""Writes that no decision depends on."""


class KillSwitch:
    """A request hook."""

    def __init__(self, where: str) -> None:
        """Take `before:N` or `after:N`, N from 1.

        Raises:
            ValueError: it is neither.
        """
        self._when, _, number = where.partition(":")
        self._left = int(number)
        if self._when not in ("before", "after") or self._left < 1:
            raise ValueError(f"{VARIABLE}={where}: write before:N or after:N, N from 1")

    def before(self, method: str, path: str) -> None:
        """Count a write."""
        if self._counts(method, path):
            self._left -= 1
            if self._left == 0 and self._when == "before":
                os.kill(os.getpid(), signal.SIGKILL)

    def after(self, method: str, path: str, status: int, seconds: float) -> None:
        """End after the write that was counted last."""
        del status, seconds
        if self._counts(method, path) and self._left <= 0 and self._when == "after":
            os.kill(os.getpid(), signal.SIGKILL)

    @staticmethod
    def _counts(method: str, path: str) -> bool:
        return method not in ("GET", "WATCH") and not any(part in path for part in UNCOUNTED)
