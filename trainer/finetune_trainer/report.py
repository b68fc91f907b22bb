"""Reports from a rank to its supervisor (lines of RankReport on a pipe) and to the log."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from finetune_contract.heartbeat import (
    MAX_DETAIL,
    MAX_TEXT,
    CommittedCheckpoint,
    Performance,
    RankReport,
    RankState,
    UnfinishedOutput,
    WrittenOutput,
)
from finetune_contract.identity import MAX_INPUTS, InputIdentity
from finetune_trainer.phases import Phases

_LOG = logging.getLogger(__name__)
MIN_GAP_SECONDS = 0.2
"""Minimum time between two progress reports. Changes of state are reported at once."""
NUM_WARNINGS = 5


class Reporter:
    """Sends the newest report. Training never waits for the pipe: each line contains the complete report.

    The loop's thread and the writer's thread use the same reporter.
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
        """Report a new state. A repetition of the current state is not reported."""
        if state is not self._report.state or not math.isfinite(self._sent_at):
            _LOG.info("%s", state.value.lower())
            self._send(state=state, detail=None)

    def detail(self, text: str) -> None:
        """Report the progress within the state; rate-limited."""
        self._send_limited(detail=text[:MAX_DETAIL])

    def waiting(self, reason: str) -> None:
        """Report at once what this rank waits for; an empty text ends the wait. The next report may be minutes away."""
        self._send(detail=reason[:MAX_DETAIL])

    def begin(self, restored_step: int, total_steps: int | None) -> None:
        """Report the first and the last step of this attempt; None: the last one is not known."""
        self._send(step=restored_step, restored_step=restored_step, total_steps=total_steps)

    def progress(self, step: int, loss: float, images_per_second: float | None) -> None:
        """Report the progress of training; rate-limited."""
        finite = loss if math.isfinite(loss) else None
        self._send_limited(step=step, loss=finite, images_per_second=images_per_second)

    def started(self, phases: Phases) -> None:
        """Report the durations of the phases up to the end of the first step."""
        _LOG.info("%s", phases.describe())
        self._send(start_seconds={name.value: round(seconds, 3) for name, seconds in phases.seconds.items()})

    def performance(self, performance: Performance) -> None:
        """Add a measurement to the next report."""
        with self._lock:
            self._report = self._report.model_copy(update={"performance": performance})

    def checkpoint(self, checkpoint: CommittedCheckpoint) -> None:
        """Report a committed and verified checkpoint."""
        self._send(checkpoint=checkpoint)

    def checkpoint_error(self, text: str) -> None:
        """Report why no newer checkpoint can be written; an empty text means that saving works again."""
        text = text[:MAX_TEXT]
        if text != (self._report.checkpoint_error or ""):
            self._send(checkpoint_error=text)

    def corrupt_checkpoints(self, number: int) -> None:
        """Report the number of damaged checkpoints that were renamed and kept."""
        self._send(corrupt_checkpoints=number)

    def outputs(self, outputs: tuple[WrittenOutput, ...], unfinished: tuple[UnfinishedOutput, ...] = ()) -> None:
        """Report the written outputs, and those that are not complete; mere progress is rate-limited."""
        before = [(each.to, each.state) for each in self._report.unfinished_outputs]
        is_news = outputs != self._report.outputs or before != [(each.to, each.state) for each in unfinished]
        send = self._send if is_news else self._send_limited
        send(outputs=outputs, unfinished_outputs=unfinished)

    def inputs(self, inputs: tuple[InputIdentity, ...]) -> None:
        """Report what this attempt has found of the base and the data."""
        self._send(inputs=inputs[:MAX_INPUTS])

    def warn(self, text: str) -> None:
        """Report a warning to the user."""
        _LOG.warning("%s", text)
        self._add_warning(text)

    def note(self, text: str) -> None:
        """Report an automatic choice to the user. The status shows it next to the warnings."""
        _LOG.info("%s", text)
        self._add_warning(text)

    def _add_warning(self, text: str) -> None:
        with self._lock:
            self._send(warnings=(*self._report.warnings, text[:MAX_TEXT])[-NUM_WARNINGS:])

    def _send_limited(self, **changes: Any) -> None:
        with self._lock:
            self._report = self._report.model_copy(update=changes)
            if self._clock() - self._sent_at >= MIN_GAP_SECONDS:
                self._send()

    def _send(self, **changes: Any) -> None:
        with self._lock:
            self._report = self._report.model_copy(update=changes)
            self._sent_at = self._clock()
            if self._fd is not None:
                # If the pipe is full, the next line repeats the report. If it is closed, the supervisor has exited.
                with contextlib.suppress(BlockingIOError, BrokenPipeError):
                    os.write(self._fd, self._report.to_json().encode() + b"\n")
