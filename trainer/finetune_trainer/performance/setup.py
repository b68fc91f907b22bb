"""Makes the meter of a rank: the figures that it reports, and the settings that decide them. Called by `build`."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from finetune_contract import environment
from finetune_contract.heartbeat import StepSettings
from finetune_contract.methods import precision_of
from finetune_contract.spec import Sharding, SwitchMode, TrainingSpec
from finetune_trainer.distributed.world import World
from finetune_trainer.models.family import Family
from finetune_trainer.performance.device import allows_tf32, device_name
from finetune_trainer.performance.flops import FLOPS_FILE, SampleFlops
from finetune_trainer.performance.meter import COUNT_AFTER_SECONDS, StepMeter
from finetune_trainer.performance.peaks import TERA, peak_flops

_LOG = logging.getLogger(__name__)


def make_meter(  # noqa: PLR0913, PLR0917
    training: TrainingSpec,
    family: Family,
    world: World,
    job_dir: Path,
    has_bf16: bool,
    waited: Callable[[], float],
    changing: Callable[[], Mapping[str, Any]],
    env: Mapping[str, str] = os.environ,
) -> StepMeter:
    """Return the meter of a rank. Rank 0 alone counts operations, because all ranks compute the same model.

    Args:
        training: the settings, after the choice of a memory preset.
        family: the base model.
        world: the ranks.
        job_dir: the job's folder, which keeps the count of operations for later attempts.
        has_bf16: whether the device has bf16 instructions.
        waited: returns the total seconds that the loop has waited for samples.
        changing: returns the fields of StepSettings that a run may change itself.
        env: environment variables.
    """
    device = world.device
    if not world.is_first:
        return StepMeter(device, waited=waited)
    peak = known_peak(training, device, env)
    fixed = describe_settings(training, device, has_bf16)
    return StepMeter(
        device,
        None if peak is None else SampleFlops(family, training, job_dir / FLOPS_FILE, device),
        peak,
        lambda: fixed.model_copy(update=changing()),
        waited,
        count_after=float(env.get(environment.COUNT_AFTER_SECONDS) or COUNT_AFTER_SECONDS),
    )


def known_peak(training: TrainingSpec, device: torch.device, env: Mapping[str, str]) -> float | None:
    """Return the peak of the device in FLOP/s: from the environment, else from the table; None if unknown."""
    text = env.get(environment.PEAK_TERAFLOPS, "")
    try:
        given = float(text or 0)
    except ValueError:
        given = math.nan
    if given > 0 and math.isfinite(given):
        return given * TERA
    if text:
        _LOG.warning("%s: %r is no number above 0; write e.g. 989, or leave it out", environment.PEAK_TERAFLOPS, text)
    return peak_flops(device_name(device), precision_of(training), allows_tf32(device))


def describe_settings(training: TrainingSpec, device: torch.device, has_bf16: bool) -> StepSettings:
    """Return the settings that decide the speed, as the run begins."""
    return StepSettings(
        device=device_name(device)[:128],
        precision=precision_of(training).value,
        batch_size=training.batch_size,
        has_bf16=has_bf16,
        gradient_checkpointing=training.gradient_checkpointing,
        is_compiled=training.compile is SwitchMode.ON,
        exchange_precision=training.exchange_precision.value,
        is_sharded=training.sharding is not Sharding.NONE,
    )
