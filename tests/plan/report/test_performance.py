"""Speed, memory and bottleneck in the status."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_contract.heartbeat import NOT_FORKED, Performance, RankReport, RankState, StepSettings, StepShares
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.status import Bottleneck, TimeShares
from finetune_operator.cluster.kube.work.urgency import is_progress
from finetune_operator.plan.report.performance import combine
from tests.plan.fake_cluster import FakeCluster

SETTINGS = StepSettings(device="NVIDIA H200", precision="fp32", batch_size=1, has_bf16=True, exchange_precision="bf16")


def measured(memory: int, **figures: Any) -> Performance:
    return Performance(
        memory_allocated_bytes=memory,
        memory_reserved_bytes=memory + 2**20,
        memory_total_bytes=2**40,
        shares=StepShares(compute=0.7004, exchange=0.2996),
        **figures,
    )


FIRST = measured(
    5 * 2**30 + 1,
    share_of_peak=0.41999,
    flops_per_second=4.1537e14,
    utilization=0.876543,
    settings=SETTINGS,
)
SECOND = measured(9 * 2**30, utilization=0.8)


def train(cluster: FakeCluster, step: int, *performances: Performance | None) -> None:
    for rank, performance in enumerate(performances):
        cluster.beat(rank, step=step, performance=performance)
    cluster.settle()


def test_figures_of_all_ranks_are_in_the_status() -> None:
    cluster = FakeCluster().running()
    train(cluster, 10, FIRST, SECOND)
    found = cluster.job.status.performance
    assert found is not None
    assert (found.share_of_peak, found.teraflops, found.utilization) == (0.42, 415, 0.838)
    # The rank with the most memory decides whether the job runs out of it.
    assert (found.memory_allocated_bytes, found.memory_reserved_bytes) == (9 * 2**30, 9 * 2**30 + 2**20)
    assert found.time_shares == TimeShares(compute=0.7, exchange=0.3)
    assert found.bound_by is Bottleneck.EXCHANGE
    assert any("gradientAccumulation" in advice for advice in found.advice)
    document = cluster.job.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert FineTuneJob.model_validate(document) == cluster.job
    assert document["status"]["performance"]["boundBy"] == "Exchange"


def test_advice_names_why_a_rank_was_not_forked() -> None:
    """The log alone is not enough: somebody who sees slow restarts reads the status first."""
    cluster = FakeCluster().running()
    refusal = f"{NOT_FORKED}, so every restart imports the libraries again: torch.py:1 has opened /dev/nvidia0"
    cluster.beat(0, step=1, performance=FIRST)
    cluster.beat(1, step=1, performance=SECOND, warnings=("a caption was cut", refusal))
    cluster.settle()
    found = cluster.job.status.performance
    assert found is not None
    assert [advice for advice in found.advice if advice.startswith("restart-bound")] == [f"restart-bound: {refusal}"]
    assert len(found.advice) > 1
    train(cluster, 2, FIRST, SECOND)
    assert cluster.job.status.performance is not None
    assert not [advice for advice in cluster.job.status.performance.advice if advice.startswith("restart-bound")]


def test_figures_stay_while_none_are_measured() -> None:
    """Old trainers report none, and a finished rank measures nothing."""
    cluster = FakeCluster().running()
    train(cluster, 5, None, None)
    assert cluster.job.status.performance is None
    train(cluster, 10, FIRST, SECOND)
    known = cluster.job.status.performance
    train(cluster, 11, None, None)
    assert cluster.job.status.performance == known
    cluster.beat(0, RankState.EXPORTING, step=12, performance=measured(1))
    cluster.beat(1, RankState.EXPORTING, step=12)
    cluster.settle()
    assert cluster.job.status.performance == known


def test_the_same_figures_change_nothing_and_new_ones_are_progress() -> None:
    cluster = FakeCluster().running()
    train(cluster, 10, FIRST, SECOND)
    before = cluster.job.status
    for _ in range(3):
        train(cluster, 10, FIRST, SECOND)
    assert cluster.job.status == before
    # Differences below the rounding are none.
    train(cluster, 10, FIRST.model_copy(update={"share_of_peak": 0.41998}), SECOND)
    assert cluster.job.status == before
    train(cluster, 10, FIRST.model_copy(update={"utilization": 0.5}), SECOND)
    assert cluster.job.status != before
    assert is_progress(before, cluster.job.status)


@pytest.mark.parametrize("state", [RankState.LOADING, RankState.EXPORTING, RankState.FAILED])
def test_only_ranks_that_train_count(state: RankState) -> None:
    assert combine([RankReport(rank=0, state=state, performance=FIRST)]) is None
    training = RankReport(rank=1, state=RankState.TRAINING, performance=SECOND)
    both = combine([RankReport(rank=0, state=state, performance=FIRST), training])
    assert both is not None
    assert (both.utilization, both.settings) == (0.8, None)


def test_an_old_trainer_and_an_old_operator_understand_each_other() -> None:
    report = RankReport(rank=0, state=RankState.TRAINING, step=3, performance=FIRST)
    text = report.to_json()
    assert RankReport.model_validate_json(text) == report
    newer = text.replace('"utilization"', '"fieldOfALaterVersion":1,"utilization"')
    assert RankReport.model_validate_json(newer) == report
    assert RankReport.model_validate_json('{"rank":0,"state":"Training"}').performance is None
