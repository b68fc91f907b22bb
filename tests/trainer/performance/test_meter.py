"""The meter with a clock that the test sets, and a stand-in for the events of a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finetune_contract.heartbeat import Performance, StepSettings
from finetune_trainer.data.batches import Batch
from finetune_trainer.performance.device import MemoryUse
from finetune_trainer.performance.flops import SampleFlops, shape_key
from finetune_trainer.performance.meter import NUM_STEPS, Part, StepMeter, summarize
from finetune_trainer.performance.shares import StepTimes

CPU = torch.device("cpu")


class Clock:
    """Time that passes only when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class ReplayedStopwatch:
    """Stand-in for CUDA events: the times that the device would report, one per step."""

    def __init__(self, *seconds: float) -> None:
        self._seconds = list(seconds)
        self.calls: list[str] = []

    def start(self) -> None:
        self.calls.append("start")

    def stop(self) -> None:
        self.calls.append("stop")

    def take(self) -> float | None:
        self.calls.append("take")
        return self._seconds.pop(0)


class CountedFlops(SampleFlops):
    """Operations that are proportional to the pixels."""

    def __init__(self) -> None:
        self._counts = {}

    def count(self, batch: Batch) -> None:
        assert batch.latents.device.type == "meta"
        self._counts[shape_key(batch)] = float(batch.latents[0].numel())


def make_batch(count: int, side: int) -> Batch:
    latents = torch.zeros(count, 4, side, side)
    return Batch(latents, latents, torch.zeros(count, dtype=torch.int64), ("",) * count, {"hidden": latents})


def run_step(
    meter: StepMeter, clock: Clock, seconds: dict[Any, float], *batches: Batch, waited: list[float] | None = None
) -> None:
    meter.begin()
    meter.start_passes()
    for batch in batches:
        meter.add(batch)
    for part, length in seconds.items():
        if isinstance(part, Part):
            with meter.part(part):
                clock.now += length
        else:
            clock.now += length
        if waited is not None and part == "data":
            waited[0] += length
    meter.end()


def test_figures_of_a_rank() -> None:
    clock, waited, flops = Clock(), [0.0], CountedFlops()
    settings = StepSettings(device="cpu", precision="fp32", batch_size=2)
    meter = StepMeter(CPU, flops, 1024.0, lambda: settings, lambda: waited[0], clock, count_after=0)
    assert meter.measure() is None
    # The first step compiles and allocates: it is not measured.
    run_step(meter, clock, {"work": 1000.0}, make_batch(2, 8))
    assert meter.measure() is None
    seconds = {"data": 1.0, "work": 4.0, Part.EXCHANGE: 2.0, Part.SYNC: 0.0, Part.CHECKPOINT: 2.0}
    run_step(meter, clock, seconds, make_batch(2, 8), make_batch(1, 8), make_batch(1, 4), waited=waited)
    figures = meter.measure()
    assert figures is not None
    operations = 3 * 256 + 64
    assert figures.flops_per_second == pytest.approx(operations / 9)
    assert figures.share_of_peak == pytest.approx(operations / 9 / 1024)
    assert figures.shares is not None
    assert figures.shares.model_dump() == pytest.approx(
        {"compute": 4 / 9, "host": 0, "data": 1 / 9, "exchange": 2 / 9, "checkpoint": 2 / 9}
    )
    assert figures.utilization == figures.shares.compute
    assert figures.settings == settings
    # No more than one measurement in a second.
    run_step(meter, clock, {"work": 0.5}, make_batch(2, 8))
    assert meter.measure() is None
    run_step(meter, clock, {"work": 0.5}, make_batch(2, 8))
    assert meter.measure() is not None


def test_passes_that_are_repeated_count_once() -> None:
    """Memory ran out in the second micro-batch: the step starts again in smaller parts."""
    clock, flops = Clock(), CountedFlops()
    meter = StepMeter(CPU, flops, clock=clock, count_after=0)
    for _ in range(2):
        meter.begin()
        meter.start_passes()
        meter.add(make_batch(4, 8))
        meter.start_passes()
        for _ in range(2):
            meter.add(make_batch(2, 8))
        clock.now += 1.0
        meter.end()
    figures = meter.measure()
    assert figures is not None
    assert figures.flops_per_second == 4 * 256


def test_only_the_last_steps_count() -> None:
    clock = Clock()
    meter = StepMeter(CPU, clock=clock)
    run_step(meter, clock, {"first": 1.0})
    for _ in range(NUM_STEPS):
        run_step(meter, clock, {Part.EXCHANGE: 1.0})
    for _ in range(NUM_STEPS):
        run_step(meter, clock, {"work": 1.0})
    figures = meter.measure()
    assert figures is not None
    assert figures.shares is not None
    assert figures.shares.compute == 1


def test_the_exchange_of_a_gpu_is_that_of_its_own_timeline() -> None:
    clock, stopwatch = Clock(), ReplayedStopwatch(99.0, 3.0)
    meter = StepMeter(CPU, clock=clock, stopwatch=stopwatch)
    meter._is_gpu = True
    for _ in range(2):
        run_step(meter, clock, {"launches": 1.0, Part.EXCHANGE: 0.0, Part.SYNC: 9.0})
    assert stopwatch.calls == ["start", "stop", "take"] * 2
    figures = summarize([times for times, _ in meter._steps], None, True, None, MemoryUse(3, 4, 5), None)
    assert figures.shares is not None
    assert (figures.shares.exchange, figures.shares.compute, figures.shares.host) == pytest.approx((0.3, 0.7, 0))
    assert (figures.memory_allocated_bytes, figures.memory_reserved_bytes, figures.memory_total_bytes) == (3, 4, 5)


@pytest.mark.parametrize(
    ("times", "busy", "expected"),
    [
        (StepTimes(10.0, sync=9.0, data=1.0, device_exchange=0.0), None, 0.9),
        # Nobody knows how long a GPU works between two launches, except its driver.
        (StepTimes(10.0, sync=0.0, device_exchange=0.0), None, None),
        (StepTimes(10.0, sync=0.0, device_exchange=0.0), 0.35, 0.35),
    ],
)
def test_utilization_of_a_gpu(times: StepTimes, busy: float | None, expected: float | None) -> None:
    found = summarize([times], None, True, None, MemoryUse(1), busy).utilization
    assert found == (None if expected is None else pytest.approx(expected))


def test_operations_are_counted_late_and_then_for_all_steps() -> None:
    clock, flops = Clock(), CountedFlops()
    meter = StepMeter(CPU, flops, 256.0, clock=clock, count_after=30.0)
    for _ in range(3):
        run_step(meter, clock, {"work": 10.0}, make_batch(2, 8))
        figures = meter.measure()
        assert figures is None or (figures.share_of_peak, figures.flops_per_second) == (None, None)
        assert flops.known("4x8x8") is None
    # The count is there, and belongs to the steps before it, too.
    run_step(meter, clock, {"work": 10.0}, make_batch(2, 8))
    figures = meter.measure()
    assert figures is not None
    assert (figures.share_of_peak, figures.flops_per_second) == pytest.approx((0.2, 51.2))
    # A new shape is counted after its step.
    run_step(meter, clock, {"work": 10.0}, make_batch(2, 4))
    figures = meter.measure()
    assert figures is not None
    assert figures.share_of_peak == pytest.approx((3 * 512 + 2 * 64) / 40 / 256)


def test_an_absurd_peak_does_not_end_the_heartbeats() -> None:
    figures = summarize([StepTimes(1.0)], 1e12, False, 1.0, MemoryUse(1), None)
    assert Performance.model_validate_json(figures.to_json()).share_of_peak == 10
