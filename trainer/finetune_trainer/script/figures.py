"""The figures of a script that the status shows: steps, loss, learning rate, images per second."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from finetune_trainer.report import Reporter

LOSS_NAMES = ("train_loss", "loss", "step_loss")
READ_SECONDS = 5.0
"""Interval between reads of a loss from a GPU: each one waits for the device."""
SHOW_SECONDS = 1.0
"""Interval between reports of the learning rate."""
WINDOW_SECONDS = 10.0
"""Images per second are a mean over about this time."""


class Figures:
    """Collects figures, and reports them after each step.

    Args:
        reporter: of this rank.
        world_size: number of ranks.
        total_steps: steps of the script, if its flags name them.
        clock: seconds.
    """

    def __init__(
        self,
        reporter: Reporter,
        world_size: int,
        total_steps: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps = total_steps
        self._has_flag = total_steps is not None
        self._reporter = reporter
        self._world_size = world_size
        self._clock = clock
        self._loss = math.nan
        self._logged = False
        self._samples = 0
        self._since = clock()
        self._read_at = -math.inf
        self._rate: float | None = None
        self._learning_rate: float | None = None
        self._shown_at = -math.inf

    def saw_batch(self, batch: Any) -> None:
        """Count the samples of a batch of this rank."""
        self._samples += batch_size(batch)

    def saw_loss(self, loss: Tensor) -> None:
        """Record the loss of a backward pass; a logged loss takes precedence."""
        if self._logged or loss.numel() != 1:
            return
        if loss.device.type == "cpu" or self._clock() - self._read_at >= READ_SECONDS:
            self._read_at = self._clock()
            self._loss = float(loss.detach())

    def saw_log(self, values: Mapping[str, Any]) -> None:
        """Record the loss among the values that the script logs."""
        named = [name for name in LOSS_NAMES if name in values]
        named += [name for name in values if name.endswith("loss") and name not in named]
        for name in named:
            value = values[name]
            if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.device.type == "cpu"):
                self._loss, self._logged = float(value), True
                return

    def saw_progress_bar(self, total: object) -> None:
        """Record the total of the script's progress bar, unless a flag names the steps."""
        if not self._has_flag and isinstance(total, (int, float)) and total > 0:
            self.total_steps = int(total)

    def begin(self, restored_step: int) -> None:
        """Report where this attempt begins."""
        self._since, self._samples = self._clock(), 0
        self._reporter.begin(restored_step, self.total_steps)

    def after_step(self, step: int, learning_rate: float | None) -> None:
        """Report the figures after an optimizer step."""
        now = self._clock()
        if (elapsed := now - self._since) > 0:
            rate = self._samples * self._world_size / elapsed
            weight = min(1.0, elapsed / WINDOW_SECONDS)
            self._rate = rate if self._rate is None else (1 - weight) * self._rate + weight * rate
        self._since, self._samples = now, 0
        if learning_rate is not None and learning_rate != self._learning_rate and now - self._shown_at >= SHOW_SECONDS:
            self._learning_rate, self._shown_at = learning_rate, now
            self._reporter.detail(f"learning rate {learning_rate:.3g}")
        self._reporter.progress(step, self._loss, self._rate)

    def resume_clock(self) -> None:
        """Leave the time since the last step out of the rate: the script, or the hook, has saved or validated."""
        self._since = self._clock()


def batch_size(batch: Any) -> int:
    """Return the number of samples of a batch: the first dimension of the first tensor in it; 0 if it has none."""
    if isinstance(batch, Tensor):
        return int(batch.shape[0]) if batch.ndim else 1
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        for each in batch:
            if size := batch_size(each):
                return size
        return len(batch) if batch and isinstance(batch[0], str) else 0
    return 0
