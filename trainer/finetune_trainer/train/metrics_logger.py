"""What the loop and the validation tell the trackers, gathered over a few steps; rank 0 has one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from finetune_trainer.distributed.gradients import NUM_TIMESTEP_BUCKETS
from finetune_trainer.train.trackers import Tracker

_LOG = logging.getLogger(__name__)
EVERY_STEPS = 10
"""Numbers are told at the first step and at every so many."""


class MetricsLogger:
    """Tells all trackers, and goes on without one that fails: a curve is not worth a run."""

    def __init__(self, trackers: Sequence[Tracker], num_timesteps: int, warn: Callable[[str], None]) -> None:
        self._trackers = list(trackers)
        self._num_timesteps = num_timesteps
        self._warn = warn
        self._sums = [0.0] * NUM_TIMESTEP_BUCKETS
        self._counts = [0.0] * NUM_TIMESTEP_BUCKETS

    def step(self, step: int, values: Mapping[str, float], sums: Sequence[float], counts: Sequence[float]) -> None:
        """Take in a finished step.

        Args:
            step: its number, from 1.
            values: what there is to tell of it.
            sums: of the losses of its samples, by tenth of the schedule.
            counts: of the samples.
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

    def validation(self, step: int, values: Mapping[str, float], grid: Path | None) -> None:
        """Tell what a look at the model has found."""
        if values:
            self._each(lambda tracker: tracker.log(step, values))
        if grid is not None:
            self._each(lambda tracker: tracker.picture(step, grid))

    def close(self) -> None:
        """Nothing more comes from this attempt."""
        self._each(lambda tracker: tracker.close())

    def _bucket_name(self, index: int) -> str:
        first, end = (number * self._num_timesteps // NUM_TIMESTEP_BUCKETS for number in (index, index + 1))
        return f"loss/timesteps {first:04d}-{end - 1:04d}"

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                tell(tracker)
            except Exception as error:
                # The libraries raise kinds of their own.
                _LOG.exception("tracker")
                self._warn(f"training.trackers: {type(tracker).__name__} is given up: {error}")
                self._trackers.remove(tracker)
