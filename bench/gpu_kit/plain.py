"""Speed and peak memory of a plain loop: diffusers, accelerate and peft as the usual scripts use them."""

from __future__ import annotations

import gc
import time

from accelerate import Accelerator

from bench.gpu_kit.bases import case_of, gib, make_family, write_pictures
from bench.gpu_kit.items import Context
from bench.train_plain import PlainLoop
from testing.measure.device import measured_device, peak_bytes, reset_peak, synchronize

MEASURED_STEPS = 4


def plain(context: Context, case: str) -> None:
    """Measure the steps of the plain loop with the first batch size of a case."""
    chosen = case_of(context, case)
    pictures = sorted(write_pictures(context, chosen).glob("[0-9]*.png"))
    began = time.monotonic()
    reset_peak()
    loop = accelerated(PlainLoop(make_family(chosen), chosen.method, pictures, chosen.resolution, chosen.batch))
    if chosen.training.get("gradientCheckpointing"):
        loop.unet.enable_gradient_checkpointing()
    loop.step()
    synchronize()
    context.record.add(case=case, batch=chosen.batch, first_step_seconds=time.monotonic() - began)
    steps = 1 if context.tiny else MEASURED_STEPS
    gc.collect()
    synchronize()
    began = time.monotonic()
    for _ in range(steps):
        loop.step()
    synchronize()
    seconds = (time.monotonic() - began) / steps
    context.record.add(seconds_per_step=seconds, images_per_second=chosen.batch / seconds, peak_gib=gib(peak_bytes()))


def accelerated(loop: PlainLoop) -> PlainLoop:
    """Prepare the trained model and the optimizer of a loop with accelerate."""
    accelerator = Accelerator(mixed_precision="bf16", cpu=measured_device().type == "cpu")
    if loop.controlnet is not None:
        loop.controlnet = accelerator.prepare(loop.controlnet)
    else:
        loop.unet = accelerator.prepare(loop.unet)
    loop.optimizer = accelerator.prepare(loop.optimizer)
    return loop
