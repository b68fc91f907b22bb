"""Speed and peak memory of the product's training loop on one case, and a profile of it."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu_kit.bases import case_of, gib, make_case_loop, make_training
from bench.gpu_kit.items import Context
from finetune_trainer.train.loop import Loop
from testing.gpu_kit.trace import TraceEvent, summarize
from testing.measure.device import measured_device, peak_bytes, synchronize

WARM_UP_STEPS = 4
"""Steps before the first measured one: kernels are chosen, graphs are captured."""
MEASURED_SECONDS = 5.0
MOST_STEPS = 40
LEAST_STEPS = 3
PROFILED_STEPS = 2
MAX_TRACE_BYTES = 8 * 2**20
_SETTINGS = (
    *("precision", "masterWeights", "weights", "compile", "cudaGraphs", "attention", "gradientCheckpointing"),
    *("optimizer", "batchSize"),
)
"""Settings that decide the speed; a version has some of them."""


def training(
    context: Context, case: str, large: bool = False, profiled: bool = False, settings: Mapping[str, Any] | None = None
) -> None:
    """Measure the steps of the product's loop.

    Args:
        context: the measurement.
        case: name of the case.
        large: whether to use the larger batch.
        profiled: whether to profile a few steps afterwards.
        settings: additional settings, by their manifest names.
    """
    chosen = case_of(context, case)
    batch = chosen.large_batch if large else chosen.batch
    spec = make_training(chosen, batch, settings or {})
    began = time.monotonic()
    loop, _ = make_case_loop(context, chosen, spec)
    built = time.monotonic()
    loop.train_step()
    synchronize()
    context.record.add(
        case=case,
        batch=batch,
        settings=describe(loop),
        build_seconds=built - began,
        first_step_seconds=time.monotonic() - built,
    )
    seconds = time_steps(loop, 1 if context.tiny else WARM_UP_STEPS, 0.0 if context.tiny else MEASURED_SECONDS)
    context.record.add(
        seconds_per_step=seconds,
        images_per_second=batch / seconds,
        peak_gib=gib(peak_bytes()),
        reserved_gib=gib(torch.cuda.max_memory_reserved()) if torch.cuda.is_available() else None,
    )
    _add_notes(context, loop)
    if profiled:
        _profile(context, loop, case, seconds)


def describe(loop: Loop) -> dict[str, Any]:
    """Return the settings that decide the speed, as this version names them."""
    values = loop.spec.training.model_dump(mode="json", by_alias=True)
    return {name: values[name] for name in _SETTINGS if name in values}


def _add_notes(context: Context, loop: Loop) -> None:
    """Record what the loop has told its user, for example why it uses no graphs."""
    notes = list(loop.reporter._report.warnings)
    if notes:
        context.record.add(notes=notes)


def time_steps(loop: Loop, warm_up: int, at_least: float) -> float:
    """Return the mean duration of a step, without waiting for the device in between.

    Args:
        loop: the loop.
        warm_up: number of steps before the measurement.
        at_least: seconds to measure, if that are not too many steps.
    """
    for _ in range(warm_up):
        loop.train_step()
    gc.collect()
    synchronize()
    began = time.monotonic()
    number = 0
    while number < LEAST_STEPS or (number < MOST_STEPS and time.monotonic() - began < at_least):
        loop.train_step()
        number += 1
    synchronize()
    return (time.monotonic() - began) / number


def _profile(context: Context, loop: Loop, case: str, step_seconds: float) -> None:
    """Profile a few steps. The figures are recorded before the trace is written, which may take long."""
    has_gpu = measured_device().type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if has_gpu else [])]) as profiler:
        for _ in range(PROFILED_STEPS):
            loop.train_step()
        synchronize()
    context.record.add(profile=summarize(read_events(profiler), PROFILED_STEPS, step_seconds))
    folder = context.folder / "profiles"
    folder.mkdir(exist_ok=True)
    path = folder / f"{case}.json.gz"
    profiler.export_chrome_trace(str(path))
    if path.stat().st_size > MAX_TRACE_BYTES:
        path.unlink()
        context.record.add(trace=f"removed: larger than {MAX_TRACE_BYTES >> 20} MiB")
    else:
        context.record.add(trace=path.name)


def read_events(profiler: Any) -> list[TraceEvent]:
    """Return the events of a profile without the user's annotations, which cover kernels."""
    events = []
    for event in profiler.profiler.kineto_results.events():
        if event.is_user_annotation():
            continue
        on_device = event.device_type().name == "CUDA"
        events.append(TraceEvent(event.name(), on_device, event.start_ns(), event.duration_ns()))
    return events
