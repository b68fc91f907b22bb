"""Where the time of a step goes: tables of times, as a host and a GPU measure them."""

from __future__ import annotations

import pytest

from finetune_contract.heartbeat import StepShares
from finetune_trainer.performance.shares import StepTimes, mean_shares

CASES = [
    # On a CPU, everything but the waits is computation.
    ("compute", False, StepTimes(10.0), {"compute": 1.0}),
    (
        "all on a CPU",
        False,
        StepTimes(10.0, data=1, exchange=2, sync=1, checkpoint=3),
        {"data": 0.1, "exchange": 0.2, "checkpoint": 0.3, "compute": 0.4},
    ),
    # The GPU is done as soon as the host has launched the last operation.
    ("host", True, StepTimes(10.0, sync=0.0, device_exchange=0.0), {"host": 1.0}),
    ("host, short wait", True, StepTimes(10.0, sync=0.4, device_exchange=0.0), {"host": 0.96, "compute": 0.04}),
    # The host waits for the GPU: the launches cost nothing.
    ("device", True, StepTimes(10.0, sync=5.0, device_exchange=0.0), {"compute": 1.0}),
    ("graphs", True, StepTimes(10.0, sync=9.9, device_exchange=0.0), {"compute": 1.0}),
    # The wait at the end is for the network, not for the computation.
    ("exchange", True, StepTimes(10.0, sync=6.0, device_exchange=6.0), {"exchange": 0.6, "host": 0.4}),
    (
        "exchange of a busy GPU",
        True,
        StepTimes(10.0, exchange=1.0, sync=6.0, device_exchange=3.0),
        {"exchange": 0.3, "compute": 0.7},
    ),
    # Without the GPU's own time, that of the host counts.
    ("no events", True, StepTimes(10.0, exchange=2.0, sync=5.0), {"exchange": 0.2, "compute": 0.8}),
    (
        "data and a save",
        True,
        StepTimes(10.0, data=4.0, checkpoint=1.0, sync=4.0, device_exchange=0.0),
        {"data": 0.4, "checkpoint": 0.1, "compute": 0.5},
    ),
    # Clocks of parts overlap a little; the sum is still the whole.
    (
        "rounding",
        True,
        StepTimes(10.0, data=8.0, checkpoint=4.0, sync=3.0, device_exchange=9.0),
        {"data": 0.8, "checkpoint": 0.2},
    ),
]


@pytest.mark.parametrize(("is_gpu", "times", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_shares_of_one_step(is_gpu: bool, times: StepTimes, expected: dict[str, float]) -> None:
    shares = mean_shares([times], is_gpu)
    assert shares is not None
    found = shares.model_dump()
    assert found == pytest.approx(dict.fromkeys(StepShares.model_fields, 0.0) | expected)
    assert sum(found.values()) == pytest.approx(1)


def test_long_steps_count_more_than_short_ones() -> None:
    shares = mean_shares([StepTimes(9.0, data=9.0), StepTimes(1.0)], is_gpu=False)
    assert shares is not None
    assert (shares.data, shares.compute) == pytest.approx((0.9, 0.1))


def test_no_time_has_no_shares() -> None:
    assert mean_shares([], is_gpu=False) is None
    assert mean_shares([StepTimes(0.0)], is_gpu=True) is None
