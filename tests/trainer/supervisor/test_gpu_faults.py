"""Faults of GPUs that the driver reports, with a stand-in for NVML: this machine has no GPU."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import pytest

from finetune_contract.heartbeat import MAX_GPU_FAULTS, GpuFault
from finetune_trainer.supervisor.gpu_faults import GpuWatch
from testing.trainer import nvml_stand_in
from testing.trainer.nvml_stand_in import Driver

pytestmark = pytest.mark.trainer

STAND_IN = nvml_stand_in.__name__
TIMEOUT_SECONDS = 30


@pytest.fixture(name="driver")
def _driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(nvml_stand_in, "driver", driver)
    return driver


class Watched:
    """A watch of the stand-in's GPUs, and its calls."""

    def __init__(self) -> None:
        self._called: queue.Queue[None] = queue.Queue()
        self.watch = GpuWatch(lambda: self._called.put(None), STAND_IN)

    def wait(self) -> None:
        """Wait for the next fault."""
        self._called.get(timeout=TIMEOUT_SECONDS)


@pytest.fixture(name="watched")
def _watched(driver: Driver) -> Iterator[Watched]:
    watched = Watched()
    assert watched.watch.start()
    yield watched
    watched.watch.stop()


def test_errors_of_the_hardware_are_reported_once(driver: Driver, watched: Watched) -> None:
    for event in ((1, 13), (1, 79), (1, 79), (0, None)):
        driver.events.put(event)
    watched.wait()
    watched.wait()
    assert watched.watch.faults == (
        GpuFault(uuid="GPU-fake-1", xid=79, message="GPU GPU-fake-1: XID 79, the GPU has fallen off the bus"),
        GpuFault(uuid="GPU-fake-0", xid=None, message="GPU GPU-fake-0: uncorrectable ECC errors"),
    )


def test_gpu_that_no_longer_answers_has_no_uuid(driver: Driver, watched: Watched) -> None:
    driver.lost.add(0)
    driver.events.put((0, 79))
    watched.wait()
    assert [fault.uuid for fault in watched.watch.faults] == ["unknown"]


def test_only_the_first_faults_are_kept(driver: Driver, watched: Watched) -> None:
    """A broken link reports errors for all GPUs, and a heartbeat is small."""
    driver.num_gpus = 1
    events = [(0, xid) for xid in (48, 62, 64, 74, 79, 95, 110, 119, 120, 136)]
    for event in events:
        driver.events.put(event)
    for _ in events:
        watched.wait()
    assert [fault.xid for fault in watched.watch.faults] == [48, 62, 64, 74, 79, 95, 110, 119]
    assert len(watched.watch.faults) == MAX_GPU_FAULTS


def test_machines_without_a_driver_or_the_package_are_not_watched(driver: Driver) -> None:
    assert not GpuWatch(lambda: None, "no_such_module").start()
    driver.supports_events = False
    assert not GpuWatch(lambda: None, STAND_IN).start()
    driver.is_installed = False
    assert not GpuWatch(lambda: None, STAND_IN).start()
