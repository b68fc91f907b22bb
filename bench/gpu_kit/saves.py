"""How much longer steps take while a checkpoint is saved, compared with accelerate's `save_state` of equal weights."""

from __future__ import annotations

import gc
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from bench.gpu_kit.bases import gib, make_case_loop, make_family, make_training
from bench.gpu_kit.items import Context
from finetune_contract import paths
from finetune_trainer.train.loop import Loop
from testing.gpu_kit.schedule import TrainingCase
from testing.measure.device import measured_device, synchronize, time_step

CASE = TrainingCase("sd15_half", "Full", 512, 4, 4)
PLAIN_STEPS = 10
MOST_STEPS = 400
"""Steps after which a save that has not ended is given up."""
ROUNDS = 2


def checkpoint(context: Context) -> None:
    """Measure both. The first save of each allocates buffers and is not counted."""
    case = CASE.tiny() if context.tiny else CASE
    loop, job = make_case_loop(context, case, make_training(case, case.batch, {}))
    for _ in range(1 if context.tiny else 4):
        loop.train_step()
    _steps_during_save(loop, job)
    num_plain = 3 if context.tiny else PLAIN_STEPS
    normal = statistics.median(time_step(loop.train_step) for _ in range(num_plain))
    context.record.add(seconds_per_step=normal)
    extra: list[list[float]] = []
    for _ in range(ROUNDS):
        extra.append([seconds - normal for seconds in _steps_during_save(loop, job)])
        of_all = [seconds for each in extra for seconds in each]
        total = statistics.median(sum(each) for each in extra)
        context.record.add(
            steps_during_save=len(extra[-1]),
            extra_seconds_mean=statistics.mean(of_all),
            extra_seconds_max=max(of_all),
            stall_seconds=max(0.0, total),
            waited_seconds=_newest_stall(loop),
        )
    del loop
    gc.collect()
    theirs = _accelerate(context, case)
    context.record.add(accelerate_seconds=theirs, stall_ratio=max(0.0, total) / theirs)


def _steps_during_save(loop: Loop, job: Path) -> list[float]:
    """Start a save, and return the durations of the steps until it is committed.

    Raises:
        TimeoutError: it is not committed after many steps.
    """
    loop.train_step()
    os.sync()
    before = _committed(job)
    name = f"step-{loop.state.step:08d}"
    began = time.monotonic()
    loop.checkpointer.save(loop.state)
    synchronize()
    durations = [time.monotonic() - began]
    while not any(path.startswith(name) for path in _committed(job) - before):
        durations.append(time_step(loop.train_step))
        if len(durations) > MOST_STEPS:
            raise TimeoutError(f"the save was not committed within {MOST_STEPS} steps")
    # The call itself is not a step: its time is extra in the first one.
    first, *rest = durations
    return [first + rest[0], *rest[1:]] if rest else [first + time_step(loop.train_step)]


def _committed(job: Path) -> set[str]:
    """Return the names of the committed checkpoints."""
    return {path.name for path in paths.checkpoints(job).glob("step-*")}


def _newest_stall(loop: Loop) -> float | None:
    """Return how long the loop has waited for the newest save, by its own clock."""
    saved = loop.reporter._report.checkpoint
    return None if saved is None else saved.stall_seconds


def _accelerate(context: Context, case: TrainingCase) -> float:
    """Return the duration of `save_state` with the same weights and AdamW."""
    device = measured_device()
    unet: Any = make_family(case).load_denoiser(torch.float32).to(device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-6, fused=True)
    for parameter in unet.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    accelerator = Accelerator(cpu=device.type == "cpu")
    accelerator.prepare(unet, optimizer)
    seconds = []
    for _ in range(ROUNDS):
        folder = context.folder / "accelerate"
        shutil.rmtree(folder, ignore_errors=True)
        os.sync()
        synchronize()
        began = time.monotonic()
        accelerator.save_state(str(folder))
        synchronize()
        seconds.append(time.monotonic() - began)
        context.record.add(
            accelerate_seconds=min(seconds),
            accelerate_gib=gib(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())),
        )
    return min(seconds)
