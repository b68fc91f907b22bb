"""Tests of the time when a checkpoint is due, and of the `auto` interval."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_contract.interval import (
    DEFAULT_MTBF_SECONDS,
    MAX_AUTO_SECONDS,
    MIN_AUTO_SECONDS,
    auto_seconds,
    estimate_mtbf_seconds,
)
from finetune_contract.spec import CheckpointInterval
from finetune_trainer.checkpoint.interval import SaveClock, save_due

AUTO = CheckpointInterval()
STEPS = CheckpointInterval(steps=20)
SECONDS = CheckpointInterval(seconds=60)
EITHER = CheckpointInterval(steps=20, seconds=60)


@pytest.mark.parametrize(
    ("interval", "steps_since", "seconds_since", "due"),
    [
        (STEPS, 19, 1e9, False),
        (STEPS, 20, 0, True),
        (STEPS, 25, 0, True),
        (SECONDS, 1, 59, False),
        (SECONDS, 1, 60, True),
        (SECONDS, 0, 1e9, False),
        (EITHER, 20, 0, True),
        (EITHER, 1, 60, True),
        (EITHER, 19, 59, False),
        (AUTO, 1, 1, False),
        (AUTO, 1, 1e9, True),
        (AUTO, 0, 1e9, False),
    ],
)
def test_save_due(interval: CheckpointInterval, steps_since: int, seconds_since: float, due: bool) -> None:
    assert save_due(interval, SaveClock(steps_since, seconds_since, None)) is due


def test_auto_depends_on_the_measured_cost() -> None:
    assert not save_due(AUTO, SaveClock(1, 100, save_seconds=10))
    assert save_due(AUTO, SaveClock(1, 100, save_seconds=0.01))


def test_auto_is_the_young_daly_interval() -> None:
    assert auto_seconds(2.0, 7200.0) == pytest.approx((2 * 2 * 7200) ** 0.5 - 2)


@given(cost=st.floats(0, 1e4), mtbf=st.floats(1, 1e7))
def test_auto_stays_within_its_bounds(cost: float, mtbf: float) -> None:
    assert MIN_AUTO_SECONDS <= auto_seconds(cost, mtbf) <= MAX_AUTO_SECONDS


@given(cost=st.floats(0.1, 20), mtbf=st.floats(600, 1e5))
def test_auto_minimizes_lost_time(cost: float, mtbf: float) -> None:
    """Lost time per second of work: one save for each interval, and half an interval for each interruption."""

    def loss(seconds: float) -> float:
        return cost / seconds + (seconds + cost) / (2 * mtbf)

    chosen = auto_seconds(cost, mtbf)
    best = min(loss(MIN_AUTO_SECONDS * 1.05**number) for number in range(107))
    assert loss(chosen) <= best * 1.1 + 1e-9


def test_auto_saves_more_often_if_interruptions_are_frequent() -> None:
    frequent, rare = (SaveClock(1, 60, save_seconds=1, mtbf_seconds=mtbf) for mtbf in (600, 86_400))
    assert save_due(AUTO, frequent)
    assert not save_due(AUTO, rare)


def test_mtbf_estimate_moves_from_the_default_to_the_observed_value() -> None:
    assert estimate_mtbf_seconds(0, 0) == DEFAULT_MTBF_SECONDS
    assert estimate_mtbf_seconds(10 * 600, 10) < 0.2 * DEFAULT_MTBF_SECONDS
    assert estimate_mtbf_seconds(100 * 600, 100) == pytest.approx(600, rel=0.15)
