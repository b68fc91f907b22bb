"""Durations of the phases of a rank's start, from the order of its supervisor to the end of its first step.

After a failure, these are the time that the job loses. The first step logs them in one line, and the report has them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from finetune_contract import environment


class StartPhase(StrEnum):
    """A phase of a start, in the order in which they end."""

    IMPORTS = "imports"
    """Start of the process, and import of the libraries."""
    RENDEZVOUS = "rendezvous"
    """Start of the device, and connection of the ranks."""
    INPUTS = "inputs"
    """Fetching of files, and comparison of the base with the pinned one."""
    CACHE = "cache"
    """Opening of the data set and of its cache; in the first attempt the map phase, too."""
    WEIGHTS = "weights"
    """Loading of the base, and creation of the trained state."""
    RESTORE = "restore"
    """Choice, verification and reading of a checkpoint."""
    DATA_CHECK = "data check"
    """Rest of the comparison of the data set's files, which runs in the background."""
    FIRST_STEP = "first step"
    """First optimizer step, with the compilation of kernels."""


@dataclass
class Phases:
    """The durations so far.

    Attributes:
        began: monotonic time at which the start began, in seconds.
        clock: monotonic time in seconds.
        seconds: duration of each phase that has ended.
    """

    began: float = field(default_factory=time.monotonic)
    clock: Callable[[], float] = time.monotonic
    seconds: dict[StartPhase, float] = field(default_factory=dict)

    @classmethod
    def of(cls, env: Mapping[str, str]) -> Phases:
        """Return the phases of a rank whose supervisor has recorded the time of its order."""
        began = env.get(environment.RANK_ORDERED)
        return cls() if began is None else cls(float(began))

    def end(self, phase: StartPhase) -> None:
        """Record that a phase ends now. It began with the end of the previous one."""
        self.seconds[phase] = max(0.0, self.clock() - self.began - self.total)

    @property
    def total(self) -> float:
        """Seconds from the order to the end of the last phase."""
        return sum(self.seconds.values())

    def describe(self) -> str:
        """Return one line with all durations."""
        parts = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in self.seconds.items())
        return f"first step after {self.total:.1f} s: {parts}"
