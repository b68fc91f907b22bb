"""Writes the outputs, and waits for a full or failing storage instead of losing a finished run. Called by `run`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from finetune_contract.heartbeat import WrittenOutput
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import StorageError
from finetune_trainer.pauses import Pause, sleep
from finetune_trainer.report import Reporter

FIRST_PAUSE_SECONDS = 2.0
MAX_PAUSE_SECONDS = 60.0
Write = Callable[[], tuple[WrittenOutput, ...]]


@dataclass(frozen=True)
class PatientWriter:
    """Writes with retries, as a save does. All ranks take part, so that none waits in a collective for long.

    Attributes:
        world: the ranks; rank 0 writes.
        reporter: receives the reason of a failed try.
        limit_seconds: time after which the attempt fails.
        released: returns a context in which a preemption notice ends the rank at once: the last step is committed.
        clock: monotonic time in seconds.
        pause: waits between two tries.
    """

    world: World
    reporter: Reporter
    limit_seconds: float
    released: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    clock: Callable[[], float] = field(default=time.monotonic)
    pause: Pause = field(default=sleep)

    def write(self, write: Write) -> None:
        """Call `write` on rank 0 until it succeeds, and report its outputs. Return on all ranks together.

        Raises:
            StorageError: nothing could be written for longer than the limit.
        """
        began, pause = self.clock(), FIRST_PAUSE_SECONDS
        while problem := self.world.share(self._try(write)):
            if self.world.share(self.clock() - began + pause > self.limit_seconds):
                raise StorageError(
                    f"{problem}; no output could be written for {self.limit_seconds:g} s (spec.checkpoint.maxStale)"
                )
            if self.world.is_first:
                if pause == FIRST_PAUSE_SECONDS:
                    self.reporter.warn(f"{problem}; the last step is committed, and the outputs are tried again")
                self.reporter.waiting(f"{problem}; trying again")
            with self.released():
                self.pause(pause)
            pause = min(2 * pause, MAX_PAUSE_SECONDS)

    def _try(self, write: Write) -> str:
        """Write on rank 0. Return why it failed; empty if it succeeded, and on the other ranks."""
        if not self.world.is_first:
            return ""
        try:
            # An export can end at any point: the next attempt continues it.
            with self.released():
                self.reporter.outputs(write())
        except StorageError as error:
            return str(error)
        return ""
