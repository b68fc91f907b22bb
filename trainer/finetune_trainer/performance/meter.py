"""Measures the steps of the training loop, and reports speed, memory and bottleneck of this rank."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from enum import Enum

import torch

from finetune_contract.heartbeat import Performance, StepSettings, StepShares
from finetune_trainer.data.batches import Batch
from finetune_trainer.performance.device import BusyShare, GpuStopwatch, MemoryUse, Stopwatch, memory_use
from finetune_trainer.performance.flops import SampleFlops, shape_key, without_data
from finetune_trainer.performance.shares import StepTimes, mean_shares

NUM_STEPS = 20
"""Steps that the figures are averaged over."""
CPU = torch.device("cpu")
COUNT_AFTER_SECONDS = 30.0
"""Time of training after which operations are counted: a count takes seconds, and short runs do not need it."""
GAP_SECONDS = 1.0
"""Minimum time between two measurements: reading the memory of a GPU takes longer than everything else."""


class Part(Enum):
    """Parts of a step that the host waits in."""

    EXCHANGE = "exchange"
    SYNC = "sync"
    CHECKPOINT = "checkpoint"


class StepMeter:
    """Measures steps. The first one of an attempt does not count: it compiles, captures and allocates.

    Args:
        device: device of the rank.
        flops: counts the operations of a sample; None: they are not reported.
        peak_flops: peak of the device in FLOP/s; None if unknown.
        settings: returns the settings in use; they may change during the run.
        waited: returns the total seconds that the loop has waited for samples.
        clock: monotonic time in seconds.
        stopwatch: times the exchange on the device; default: CUDA events on a GPU.
        count_after: time of training after which operations are counted. Known counts are used before.
    """

    def __init__(  # noqa: PLR0913, PLR0917
        self,
        device: torch.device = CPU,
        flops: SampleFlops | None = None,
        peak_flops: float | None = None,
        settings: Callable[[], StepSettings | None] = lambda: None,
        waited: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.monotonic,
        stopwatch: Stopwatch | None = None,
        count_after: float = COUNT_AFTER_SECONDS,
    ) -> None:
        self._device, self._is_gpu = device, device.type == "cuda"
        self._flops, self._peak_flops = flops, peak_flops
        self._settings, self._waited, self._clock = settings, waited, clock
        self._stopwatch = stopwatch if stopwatch is not None or not self._is_gpu else GpuStopwatch()
        self._busy = BusyShare(device)
        self._steps: deque[tuple[StepTimes, Mapping[str, int]]] = deque(maxlen=NUM_STEPS)
        """The last steps, each with the number of its samples of each shape."""
        self._count_after, self._started_at = count_after, math.inf
        self._seconds = dict.fromkeys(Part, 0.0)
        self._began: float | None = None
        self._waited_before = 0.0
        self._samples: Counter[str] = Counter()
        self._shapes: dict[str, Batch] = {}
        self._measured_at: float | None = None

    def begin(self) -> None:
        """Start a step: everything until `end` belongs to it, with the save that may follow the update."""
        self._seconds = dict.fromkeys(Part, 0.0)
        self._waited_before = self._waited()
        self._began = self._clock()

    def start_passes(self) -> None:
        """Forget the micro-batches of this step: its passes start, or start again."""
        self._samples.clear()

    def add(self, batch: Batch) -> None:
        """Add a micro-batch to the step."""
        if self._flops is None:
            return
        key = shape_key(batch)
        self._samples[key] += len(batch.latents)
        if key not in self._shapes:
            self._shapes[key] = without_data(batch)

    @contextlib.contextmanager
    def part(self, part: Part) -> Iterator[None]:
        """Measure a part of the step. A part that fails ends the step, and is not measured."""
        stopwatch = self._stopwatch if part is Part.EXCHANGE else None
        began = self._clock()
        if stopwatch is not None:
            stopwatch.start()
        yield
        if stopwatch is not None:
            stopwatch.stop()
        self._seconds[part] += self._clock() - began

    def end(self) -> None:
        """End the step. After it, operations are counted if this is due."""
        if self._began is None:
            return
        now = self._clock()
        total = now - self._began
        self._began = None
        if math.isinf(self._started_at):
            self._started_at = now
            if self._stopwatch is not None:
                self._stopwatch.take()
            return
        times = StepTimes(
            total=total,
            data=self._waited() - self._waited_before,
            exchange=self._seconds[Part.EXCHANGE],
            device_exchange=self._stopwatch.take() if self._stopwatch is not None else None,
            sync=self._seconds[Part.SYNC],
            checkpoint=self._seconds[Part.CHECKPOINT],
        )
        self._steps.append((times, dict(self._samples)))
        if self._flops is not None and now - self._started_at >= self._count_after:
            for batch in self._shapes.values():
                self._flops.count(batch)

    def measure(self) -> Performance | None:
        """Return the figures of the last steps; None if there are none, or the last ones are less than a second old."""
        now = self._clock()
        is_too_early = self._measured_at is not None and now - self._measured_at < GAP_SECONDS
        if not self._steps or is_too_early:
            return None
        self._measured_at = now
        return summarize(
            [times for times, _ in self._steps],
            self._total_flops(),
            self._is_gpu,
            self._peak_flops,
            memory_use(self._device),
            self._busy.read(),
        ).model_copy(update={"settings": self._settings()})

    def _total_flops(self) -> float | None:
        """Return the operations of this rank in the last steps; None if those of a shape are unknown."""
        if self._flops is None:
            return None
        total = 0.0
        for _, samples in self._steps:
            for shape, number in samples.items():
                of_sample = self._flops.known(shape)
                if of_sample is None:
                    return None
                total += number * of_sample
        return total


def summarize(  # noqa: PLR0913, PLR0917
    steps: list[StepTimes],
    flops: float | None,
    is_gpu: bool,
    peak_flops: float | None,
    memory: MemoryUse,
    busy: float | None,
) -> Performance:
    """Return the figures of some steps of one rank. Pure.

    Args:
        steps: the steps; at least one.
        flops: operations of the model in them; None if unknown.
        is_gpu: whether the device works next to the host.
        peak_flops: peak of the device in FLOP/s; None if unknown.
        memory: the memory in use.
        busy: share of the time in which the device was busy, if its driver reports it.
    """
    seconds = sum(step.total for step in steps)
    speed = flops / seconds if flops is not None and seconds > 0 else None
    shares = mean_shares(steps, is_gpu)
    return Performance(
        share_of_peak=None if speed is None or peak_flops is None else min(10.0, speed / peak_flops),
        flops_per_second=speed,
        utilization=busy if busy is not None else estimate_utilization(shares),
        memory_allocated_bytes=memory.allocated,
        memory_reserved_bytes=memory.reserved,
        memory_total_bytes=memory.total,
        shares=shares,
    )


def estimate_utilization(shares: StepShares | None) -> float | None:
    """Return the share of the time in which the device computes; None if the host limits it, which hides the share."""
    return None if shares is None or shares.host > 0 else shares.compute
