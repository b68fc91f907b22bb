"""What a rank tells its supervisor: lines of RankReport on a pipe, and the log."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from finetune_contract.heartbeat import CommittedCheckpoint, RankReport, RankState, WrittenOutput

_LOG = logging.getLogger(__name__)
MIN_GAP_SECONDS = 0.2
"""Progress is told at most so often; changes of state always."""
NUM_WARNINGS = 5
MAX_DETAIL = 500


class Reporter:
    """Sends the newest report. A pipe that is full or gone never holds training up: each line says all anew.

    The loop's thread and the writer's use the same one.
    """

    def __init__(self, rank: int, fd: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._fd = fd
        self._clock = clock
        self._sent_at = -math.inf
        self._lock = threading.RLock()
        self._report = RankReport(rank=rank, state=RankState.STARTING)
        if fd is not None:
            os.set_blocking(fd, False)

    def state(self, state: RankState) -> None:
        """Enter a state, unless it is in it."""
        if state is not self._report.state or not math.isfinite(self._sent_at):
            _LOG.info("%s", state.value.lower())
            self._send(state=state, detail=None)

    def detail(self, text: str) -> None:
        """Say what the state is busy with; sent seldom."""
        self._send_seldom(detail=text[:MAX_DETAIL])

    def begin(self, restored_step: int, total_steps: int) -> None:
        """Say where this attempt begins."""
        self._send(step=restored_step, restored_step=restored_step, total_steps=total_steps)

    def progress(self, step: int, loss: float, images_per_second: float | None) -> None:
        """Say how far training is; sent seldom."""
        finite = loss if math.isfinite(loss) else None
        self._send_seldom(step=step, loss=finite, images_per_second=images_per_second)

    def checkpoint(self, checkpoint: CommittedCheckpoint) -> None:
        """Say what was committed and verified."""
        self._send(checkpoint=checkpoint)

    def checkpoint_error(self, text: str) -> None:
        """Say why no newer checkpoint can be written; an empty text: it can."""
        if text != (self._report.checkpoint_error or ""):
            self._send(checkpoint_error=text)

    def corrupt_checkpoints(self, number: int) -> None:
        """Say how many damaged checkpoints lie set aside."""
        self._send(corrupt_checkpoints=number)

    def outputs(self, outputs: tuple[WrittenOutput, ...]) -> None:
        """Say what was written."""
        self._send(outputs=outputs)

    def warn(self, text: str) -> None:
        """Tell a person something."""
        _LOG.warning("%s", text)
        self._tell(text)

    def note(self, text: str) -> None:
        """Tell a person what was chosen for them; the status shows it where it shows warnings."""
        _LOG.info("%s", text)
        self._tell(text)

    def _tell(self, text: str) -> None:
        with self._lock:
            self._send(warnings=(*self._report.warnings, text)[-NUM_WARNINGS:])

    def _send_seldom(self, **news: Any) -> None:
        with self._lock:
            self._report = self._report.model_copy(update=news)
            if self._clock() - self._sent_at >= MIN_GAP_SECONDS:
                self._send()

    def _send(self, **news: Any) -> None:
        with self._lock:
            self._report = self._report.model_copy(update=news)
            self._sent_at = self._clock()
            if self._fd is not None:
                # Full: the next line says the same. Gone: so is the supervisor, and this process soon.
                with contextlib.suppress(BlockingIOError, BrokenPipeError):
                    os.write(self._fd, self._report.to_json().encode() + b"\n")
