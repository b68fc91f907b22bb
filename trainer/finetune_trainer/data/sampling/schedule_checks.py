"""Refuses settings that would have no effect on this base and this data set, before anything is encoded.

The number of timesteps is known when the base is open, the number of steps of `epochs` when the data set is. Attempt 1
fails; a later attempt continues a run that an older version has accepted, so it only warns.
"""

from __future__ import annotations

from collections.abc import Callable

from finetune_contract.spec import LrScheduler, TrainingSpec
from finetune_trainer.data.sampling.noising import find_bias_fault
from finetune_trainer.errors import ConfigError

Warn = Callable[[str], None]


def check_schedule(training: TrainingSpec, num_timesteps: int, attempt: int, warn: Warn) -> None:
    """Check the settings of timesteps and of the learning rate against the base's schedule.

    Raises:
        ConfigError: a setting has no effect.
    """
    bias = training.timestep_bias
    if bias is not None:
        if fault := find_bias_fault(bias, num_timesteps):
            _report(fault, attempt, warn)
        elif bias.end > num_timesteps:
            warn(
                f"training.timestepBias.end: the last timestep of the base is {num_timesteps - 1}; the range ends "
                f"there. Write end: {num_timesteps}"
            )
    if training.lr_scheduler is LrScheduler.COSINE_WITH_RESTARTS and (training.lr_num_cycles or 1) == 1:
        warn(
            "training.lrNumCycles: with one cycle, cosine_with_restarts does not restart; write lrNumCycles: 2 or more"
        )


def check_length(training: TrainingSpec, total_steps: int, attempt: int, warn: Warn) -> None:
    """Check that the warm-up ends before the run. With `epochs`, the number of steps depends on the data set.

    Raises:
        ConfigError: the learning rate never reaches its peak.
    """
    if training.lr_warmup_steps == 0 or training.lr_warmup_steps < total_steps:
        return
    # One step cannot have a warm-up.
    remedy = f"write a number below {total_steps}, or more epochs" if total_steps > 1 else "write more epochs"
    _report(
        f"training.lrWarmupSteps: {training.lr_warmup_steps} steps leave no step at the full learning rate, because "
        f"epochs: {training.epochs} of this data set is {total_steps} steps; {remedy}",
        attempt,
        warn,
    )


def _report(fault: str, attempt: int, warn: Warn) -> None:
    if attempt == 1:
        raise ConfigError(fault)
    warn(fault)
