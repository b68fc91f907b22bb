"""The ledger: its limit, lost steps and goodput."""

from __future__ import annotations

import pytest

from finetune_operator.api.status import AttemptStatus, FineTuneJobStatus
from finetune_operator.plan.model import ledger
from finetune_operator.plan.model.revise import revise
from tests.plan.fake_cluster import START, FakeCluster


def test_only_the_newest_attempts_are_kept() -> None:
    status = FineTuneJobStatus()
    for attempt in range(1, 31):
        status = ledger.begin(status, attempt, START, max_kept=20)
    assert [entry.attempt for entry in status.attempts] == list(range(11, 31))
    assert status.attempt == 30


def entries(*steps: tuple[int | None, int | None]) -> FineTuneJobStatus:
    return FineTuneJobStatus(
        attempts=tuple(
            AttemptStatus(attempt=number, started_at=START, from_step=begin, to_step=end)
            for number, (begin, end) in enumerate(steps, start=1)
        )
    )


@pytest.mark.parametrize(
    ("steps", "lost", "total"),
    [
        ([(0, 45), (40, None)], [5, None], 5),
        ([(0, 40), (40, None)], [0, None], 0),
        # An attempt without a first step loses nothing; the loss of the one before it is known only after it.
        ([(0, 45), (None, None), (40, None)], [5, 0, None], 5),
        # Steps that were lost twice were trained three times.
        ([(0, 45), (None, 45), (40, None)], [5, 5, None], 10),
        ([(0, 45), (None, None)], [None, None], 0),
        ([(0, 45)], [None], 0),
    ],
)
def test_lost_steps(steps: list[tuple[int | None, int | None]], lost: list[int | None], total: int) -> None:
    status = ledger.account_lost_steps(entries(*steps))
    assert [entry.lost_steps for entry in status.attempts] == lost
    assert status.lost_steps == total
    assert ledger.account_lost_steps(status) == status


def test_goodput_of_undisturbed_run() -> None:
    """10 s of loading, then 90 s of training: goodput 0.9."""
    cluster = FakeCluster().running()
    cluster.tick(10)
    cluster.train_to(0)
    cluster.settle()
    for step in range(1, 101):
        cluster.tick(0.9)
        cluster.train_to(step)
        cluster.settle()
    for rank in (0, 1):
        cluster.exit(rank, 0)
    cluster.settle()
    assert cluster.job.status.goodput == pytest.approx(0.9, abs=0.01)


def test_goodput_counts_neither_lost_steps_nor_recovery() -> None:
    """50 steps in 50 s, the last ten lost; 25 s of recovery; 60 steps in 60 s: 100 useful seconds of 135."""
    cluster = FakeCluster().running()
    cluster.train_to(0)
    cluster.settle()
    for step in range(1, 51):
        cluster.tick(1)
        cluster.train_to(step, checkpoint=step // 40 * 40 or None)
        cluster.settle()
    cluster.pods.clear()
    cluster.running()
    cluster.tick(25)
    cluster.train_to(40, from_step=40)
    cluster.settle()
    for step in range(41, 101):
        cluster.tick(1)
        cluster.train_to(step, from_step=40)
        cluster.settle()
    assert cluster.job.status.lost_steps == 10
    assert cluster.job.status.goodput == pytest.approx(100 / 135, abs=0.02)


def test_goodput_does_not_change_while_nothing_happens() -> None:
    cluster = FakeCluster().running()
    cluster.train_to(0)
    cluster.settle()
    cluster.tick(1)
    cluster.train_to(1)
    cluster.settle()
    before = cluster.job.status
    cluster.tick(59)
    assert cluster.settle().status == before


def test_revise_refuses_unknown_fields() -> None:
    with pytest.raises(AttributeError):
        revise(FineTuneJobStatus(), stepp=1)


def test_revise_returns_the_same_object_if_nothing_changes() -> None:
    status = FineTuneJobStatus(step=1)
    assert revise(status, step=1) is status
