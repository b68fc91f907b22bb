"""Sends the metrics of the loop and of the validation to the trackers. Used by rank 0 only."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from finetune_trainer.distributed.gradients import NUM_TIMESTEP_BUCKETS
from finetune_trainer.train.trackers import Tracker

_LOG = logging.getLogger(__name__)
EVERY_STEPS = 10
"""Metrics are logged at the first step and at every multiple of this number of steps."""


class MetricsLogger:
    """Logs to all trackers. A tracker that fails is disabled, so that it cannot end the run."""

    def __init__(self, trackers: Sequence[Tracker], num_timesteps: int, warn: Callable[[str], None]) -> None:
        self._trackers = list(trackers)
        self._num_timesteps = num_timesteps
        self._warn = warn
        self._sums = [0.0] * NUM_TIMESTEP_BUCKETS
        self._counts = [0.0] * NUM_TIMESTEP_BUCKETS

    def log_step(self, step: int, values: Mapping[str, float], sums: Sequence[float], counts: Sequence[float]) -> None:
        """Add a finished step, and log if this step is due.

        Args:
            step: number of the step, from 1.
            values: metrics of the step, by name.
            sums: sums of the samples' losses, by tenth of the schedule.
            counts: numbers of samples, by tenth of the schedule.
        """
        self._sums = [old + new for old, new in zip(self._sums, sums, strict=True)]
        self._counts = [old + new for old, new in zip(self._counts, counts, strict=True)]
        if step % EVERY_STEPS != 0 and step != 1:
            return
        by_timestep = {
            self._bucket_name(index): total / count
            for index, (total, count) in enumerate(zip(self._sums, self._counts, strict=True))
            if count > 0
        }
        self._sums, self._counts = [0.0] * NUM_TIMESTEP_BUCKETS, [0.0] * NUM_TIMESTEP_BUCKETS
        self._each(lambda tracker: tracker.log(step, {**values, **by_timestep}))

    def log_validation(self, step: int, values: Mapping[str, float], grid: Path | None) -> None:
        """Log the results of a validation."""
        if values:
            self._each(lambda tracker: tracker.log(step, values))
        if grid is not None:
            self._each(lambda tracker: tracker.picture(step, grid))

    def close(self) -> None:
        """Close all trackers: this attempt logs nothing more."""
        self._each(lambda tracker: tracker.close())

    def _bucket_name(self, index: int) -> str:
        first, end = (number * self._num_timesteps // NUM_TIMESTEP_BUCKETS for number in (index, index + 1))
        return f"loss/timesteps {first:04d}-{end - 1:04d}"

    def _each(self, log: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                log(tracker)
            except Exception as error:
                # Each library raises its own exception types.
                _LOG.exception("tracker failed")
                self._warn(f"training.trackers: {type(tracker).__name__} failed and is disabled: {error}")
                self._trackers.remove(tracker)
