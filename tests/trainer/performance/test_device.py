"""What is read of a device. The events of a GPU are replaced by a stand-in with times that the test sets."""

from __future__ import annotations

import resource
from typing import Any

import pytest
import torch

from finetune_trainer.performance import device
from finetune_trainer.performance.device import BusyShare, GpuStopwatch, memory_use

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class EventStandIn:
    """Stand-in for a CUDA event: it is complete when the device has reached it."""

    reached = True
    made = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        EventStandIn.made += 1
        self.records = 0

    def record(self) -> None:
        self.records += 1

    def query(self) -> bool:
        return self.reached

    def elapsed_time(self, end: EventStandIn) -> float:
        assert self.reached
        return 250.0 * end.records


@pytest.fixture(name="events")
def _events(monkeypatch: pytest.MonkeyPatch) -> type[EventStandIn]:
    monkeypatch.setattr(torch.cuda, "Event", EventStandIn)
    monkeypatch.setattr(EventStandIn, "made", 0)
    monkeypatch.setattr(EventStandIn, "reached", True)
    return EventStandIn


def test_the_stopwatch_reads_a_pair_of_events_once(events: type[EventStandIn]) -> None:
    stopwatch = GpuStopwatch()
    assert stopwatch.take() is None
    for number in (1, 2):
        stopwatch.start()
        assert stopwatch.take() is None
        stopwatch.stop()
        assert stopwatch.take() == 0.25 * number
        assert stopwatch.take() is None
    assert events.made == 2


def test_the_stopwatch_does_not_wait_for_the_device(
    events: type[EventStandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopwatch = GpuStopwatch()
    stopwatch.start()
    stopwatch.stop()
    monkeypatch.setattr(events, "reached", False)
    assert stopwatch.take() is None
    monkeypatch.setattr(events, "reached", True)
    assert stopwatch.take() == 0.25


@pytest.mark.parametrize("error", [ModuleNotFoundError("pynvml"), RuntimeError("not supported in a part of a GPU")])
def test_a_driver_that_does_not_report_is_asked_once(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(_: Any) -> int:
        calls.append(1)
        raise error

    monkeypatch.setattr(torch.cuda, "utilization", fail)
    busy = BusyShare(GPU)
    assert busy.read() is None is busy.read()
    assert len(calls) == 1


def test_the_driver_reports_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "utilization", lambda _: 35)
    assert BusyShare(GPU).read() == 0.35
    assert BusyShare(CPU).read() is None


def test_memory_of_a_cpu_rank_is_that_of_its_process() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * device._RESIDENT_UNIT
    used = memory_use(CPU)
    assert before <= used.allocated
    assert (used.reserved, used.total) == (None, None)
