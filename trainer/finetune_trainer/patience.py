"""Waits for the end of an outage: repeats an action that reads or writes something outside this process.

Like a log, there is one for the process, so that code of any depth can use it: `patience.wait_out("...", action)`.
The supervisor sends heartbeats in the meantime, and the detail of the rank's state shows what it waits for. After a
preemption notice there is one more try, and then the attempt ends with the cause of the outage.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar

from finetune_contract import environment
from finetune_trainer.errors import NetworkError, RankError, StorageOutageError
from finetune_trainer.outages import Outage, find_outage, retry_after_seconds, root_of
from finetune_trainer.pauses import Pause, sleep

_LOG = logging.getLogger(__name__)
LIMIT_SECONDS = 600.0
"""Longest wait for one action. The time window of the hub's rate limits is 5 minutes."""
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.5, 30.0
JITTER = 0.5
"""Largest share by which a pause is longer: clients that failed together must not return together."""
_ERRORS = {Outage.NETWORK: NetworkError, Outage.STORAGE: StorageOutageError}

T = TypeVar("T")


def _limit_seconds() -> float:
    """Return the limit, or what the pod's environment has instead."""
    return float(os.environ.get(environment.RETRY_SECONDS) or LIMIT_SECONDS)


@dataclass
class Patience:
    """Repeats actions while outages last.

    Attributes:
        report: receives lines on the wait; an empty line ends it.
        limit_seconds: returns the longest wait for one action.
        clock: monotonic time in seconds.
        pause: waits between two tries.
        draw: returns a random number in [0, 1).
    """

    report: Callable[[str], None] = lambda _: None
    limit_seconds: Callable[[], float] = _limit_seconds
    clock: Callable[[], float] = field(default=time.monotonic)
    pause: Pause = field(default=sleep)
    draw: Callable[[], float] = field(default=random.random)

    def wait_out(self, what: str, action: Callable[[], T]) -> T:
        """Return the result of an action. Repeat it while it fails because of an outage.

        Args:
            what: what the action does, for the report, e.g. "fetching model.base".
            action: may be called many times.

        Raises:
            NetworkError, StorageOutageError: the outage lasts longer than the limit, or this machine is reclaimed.
            Exception: the action failed for another reason.
        """
        began, pause, tries, is_last = self.clock(), FIRST_PAUSE_SECONDS, 0, False
        while True:
            try:
                result = action()
            except Exception as error:
                outage = find_outage(error)
                if outage is None or isinstance(error, (NetworkError, StorageOutageError)):
                    raise
                tries += 1
                seconds = max(retry_after_seconds(error, datetime.now(UTC)), pause) * (1 + JITTER * self.draw())
                waited = self.clock() - began
                if is_last or waited + seconds > self.limit_seconds():
                    raise _ERRORS[outage](_give_up(what, error, tries, waited)) from error
                self._announce(f"{what} failed ({_summary(root_of(error))}): try {tries + 1} in {seconds:.1f} s")
                is_last = self.pause(seconds)
                pause = min(2 * pause, MAX_PAUSE_SECONDS)
            else:
                if tries:
                    self.report("")
                return result

    def _announce(self, line: str) -> None:
        _LOG.warning("%s", line)
        self.report(line)


_PROCESS = Patience()


def report_to(report: Callable[[str], None]) -> None:
    """Set what receives the lines on the waits of this process."""
    _PROCESS.report = report


def pause_with(pause: Pause) -> None:
    """Set how this process waits between two tries: a rank's preemption notice ends the pause."""
    _PROCESS.pause = pause


def wait_out(what: str, action: Callable[[], T]) -> T:
    """Return the result of an action. Repeat it while it fails because of an outage; see `Patience.wait_out`."""
    return _PROCESS.wait_out(what, action)


def _give_up(what: str, error: Exception, tries: int, waited: float) -> str:
    # Messages of this package name the field already.
    problem = str(error) if isinstance(error, RankError) else f"{what} failed: {_summary(root_of(error))}"
    times = "once" if tries == 1 else f"{tries} times in {waited:.0f} s"
    return f"{problem} (tried {times}; the next attempt tries again)"


def _summary(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
