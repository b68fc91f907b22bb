from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from finetune_contract.phase import Phase
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import (
    AttemptSeconds,
    AttemptStatus,
    Bottleneck,
    CheckpointStatus,
    FineTuneJobStatus,
    PerformanceStatus,
    TimeShares,
)
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.metrics import AttemptCounters, Metrics, job_metrics
from finetune_operator.plan.model import causes
from testing.operator.harness import build_job

NOW = datetime(2026, 1, 1, tzinfo=UTC)
KEY = JobKey("team", "circles")


def job(**status: Any) -> FineTuneJob:
    made = build_job("circles")
    made["metadata"]["uid"] = "u"
    return FineTuneJob.model_validate(made).model_copy(update={"status": FineTuneJobStatus(**status)})


def at(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


FIRST = AttemptStatus(attempt=1, started_at=NOW)
DETECTED = AttemptSeconds(detection=0.5)
ENDED = FIRST.model_copy(update={"ended_at": at(10), "reason": "PodLost", "seconds": DETECTED})
SECOND = AttemptStatus(attempt=2, started_at=at(12))
PARTS = AttemptSeconds(teardown=2.0, queueing=1.0, pulling=3.0, restoring=2.5, first_step=0.5)
TRAINING = SECOND.model_copy(update={"training_at": at(19), "seconds": PARTS})


def test_restart_is_counted_once_with_its_cause_and_its_parts() -> None:
    registry = CollectorRegistry()
    counters = AttemptCounters(registry)
    for attempts in ((FIRST,), (ENDED,), (ENDED, SECOND), (ENDED, TRAINING), (ENDED, TRAINING)):
        counters.update(KEY, job(attempts=attempts, lost_steps=7 if len(attempts) == 2 else 0))
    sample = registry.get_sample_value
    assert sample("finetune_attempts_ended_total", {"reason": "PodLost"}) == 1
    parts = {"detection": 0.5, "teardown": 2, "queueing": 1, "pulling": 3, "restoring": 2.5, "first_step": 0.5}
    for part, seconds in parts.items():
        assert sample("finetune_recovery_part_seconds_sum", {"part": part}) == seconds
        assert sample("finetune_recovery_part_seconds_count", {"part": part}) == 1
    # The sum over all series of a metric is a time that has passed.
    assert totals(registry, "finetune_recovery_seconds_sum") == 9
    assert totals(registry, "finetune_recovery_part_seconds_sum") == 9 + 0.5
    assert sample("finetune_lost_steps_total") == 7


def totals(registry: CollectorRegistry, name: str) -> float:
    """Return the sum over all series, as `sum(name)` computes it."""
    return sum(sample.value for family in registry.collect() for sample in family.samples if sample.name == name)


def test_series_exist_before_the_first_event() -> None:
    """`increase()` needs a sample before the event, also directly after a change of the leader."""
    sample = Metrics().registry.get_sample_value
    for kind in ("api", "bug"):
        assert sample("finetune_reconcile_errors_total", {"kind": kind}) == 0
    for name in re.findall(r"\bReason\.([A-Z_]+)", Path(causes.__file__).read_text()):
        assert sample("finetune_attempts_ended_total", {"reason": Reason[name]}) == 0, name
    for reason in (
        Reason.FINISHED,
        Reason.SUSPENDED,
        Reason.DEADLINE_EXCEEDED,
        Reason.GROWN,
        Reason.QUOTA_RELEASED,
        Reason.GANG_RELEASED,
    ):
        assert sample("finetune_attempts_ended_total", {"reason": reason}) == 0
    assert sample("finetune_recovery_seconds_count") == 0
    for part in AttemptSeconds.model_fields:
        assert sample("finetune_recovery_part_seconds_count", {"part": part}) == 0


def test_attempts_from_before_the_start_of_the_process_are_not_counted() -> None:
    registry = CollectorRegistry()
    counters = AttemptCounters(registry)
    counters.update(KEY, job(attempts=(ENDED, TRAINING), lost_steps=7))
    counters.update(KEY, job(attempts=(ENDED, TRAINING), lost_steps=7))
    counters.update(KEY, None)
    counters.update(KEY, job(attempts=(ENDED, TRAINING), lost_steps=7))
    assert totals(registry, "finetune_attempts_ended_total") == 0
    assert registry.get_sample_value("finetune_lost_steps_total") == 0


@pytest.mark.parametrize("stored", [1e308, -1.0])
def test_an_absurd_figure_in_one_status_does_not_change_the_sum_of_the_others(stored: float) -> None:
    jobs = [job(phase=Phase.RUNNING, images_per_second=speed) for speed in (2.0, stored, 3.0)]
    (family,) = (family for family in job_metrics(jobs, NOW) if family.name == "finetune_images_per_second")
    assert [sample.value for sample in family.samples] == [5.0]


def test_jobs_that_wait_or_are_silent_in_any_phase_are_measured() -> None:
    """A job whose pods never reach the coordinator, or wait for an image, stays in Starting."""
    begun = AttemptStatus(attempt=1, started_at=at(10))
    over = AttemptStatus(attempt=1, started_at=NOW, ended_at=at(30), reason="Preempted")
    jobs = [
        job(phase=Phase.STARTING, reason="Silent", attempts=(begun,)),
        job(phase=Phase.RUNNING, reason="Silent", attempts=(begun,)),
        job(phase=Phase.STARTING, reason="ImagePull", attempts=(begun,)),
        job(phase=Phase.RECOVERING, reason="BackOff", attempts=(over,)),
        # Neither of these waits, however long it takes.
        job(phase=Phase.STARTING, reason="Caching", attempts=(begun,)),
        job(phase=Phase.SUSPENDED, reason="Suspended", attempts=(over,)),
        job(phase=Phase.FAILED, reason="Silent", attempts=(over,)),
    ]
    found = {family.name: family.samples[0].value for family in job_metrics(jobs, at(60)) if family.samples}
    assert found["finetune_silent_jobs"] == 2
    assert found["finetune_longest_wait_seconds"] == 50


def test_gauges_over_all_jobs() -> None:
    checkpoint = CheckpointStatus(step=1, time=NOW, bytes=100, stall_seconds=0.02, save_seconds=2.0)
    newer = CheckpointStatus(step=1, time=at(50), bytes=11)
    jobs = [
        job(phase=Phase.RUNNING, images_per_second=2.0, goodput=0.5, last_checkpoint=checkpoint),
        job(phase=Phase.RUNNING, images_per_second=3.0, goodput=1.0, last_checkpoint=newer),
        job(phase=Phase.SUCCEEDED, images_per_second=9.0, goodput=0.1),
        job(),
    ]
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in job_metrics(jobs, at(60))
        for sample in family.samples
    }
    expected: dict[tuple[str, ...], float] = {
        ("finetune_jobs", "Running", "LoRA"): 2,
        ("finetune_jobs", "Succeeded", "LoRA"): 1,
        ("finetune_jobs", "Pending", "LoRA"): 1,
        ("finetune_images_per_second",): 5.0,
        ("finetune_silent_jobs",): 0,
        ("finetune_longest_wait_seconds",): 0,
        ("finetune_goodput_ratio",): 0.75,
        ("finetune_checkpoint_bytes",): 111,
        ("finetune_checkpoint_stall_seconds",): 0.02,
        ("finetune_checkpoint_durable_seconds",): 2.0,
        ("finetune_checkpoint_stale_jobs",): 0,
        ("finetune_slow_ranks",): 0,
        ("finetune_oldest_checkpoint_age_seconds",): 60,
    }
    # No job has reported what limits its speed.
    assert found == expected | {("finetune_bound_jobs", bottleneck.value): 0.0 for bottleneck in Bottleneck}


def test_gauges_of_the_speed_of_running_jobs() -> None:
    fast = PerformanceStatus(
        share_of_peak=0.4,
        teraflops=400,
        utilization=1.0,
        memory_allocated_bytes=50,
        memory_reserved_bytes=60,
        time_shares=TimeShares(compute=0.8, exchange=0.2),
        bound_by=Bottleneck.EXCHANGE,
    )
    # No peak is known for its device, and its memory is that of a process.
    slow = PerformanceStatus(
        utilization=0.5, memory_allocated_bytes=70, time_shares=TimeShares(compute=1.0), bound_by=Bottleneck.COMPUTE
    )
    jobs = [
        job(phase=Phase.RUNNING, performance=fast),
        job(phase=Phase.RUNNING, performance=slow),
        job(phase=Phase.RUNNING),
        job(phase=Phase.SUCCEEDED, performance=fast),
    ]
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in job_metrics(jobs, NOW)
        for sample in family.samples
    }
    assert found[("finetune_share_of_peak_ratio",)] == 0.4
    assert found[("finetune_device_utilization_ratio",)] == 0.75
    assert found[("finetune_device_memory_allocated_bytes",)] == 70
    assert found[("finetune_device_memory_reserved_bytes",)] == 60
    parts = {"compute": 0.9, "host": 0, "data": 0, "exchange": 0.1, "checkpoint": 0}
    assert {part: found["finetune_step_time_ratio", part] for part in parts} == pytest.approx(parts)
    bound = {bottleneck: found["finetune_bound_jobs", bottleneck.value] for bottleneck in Bottleneck}
    assert bound == dict.fromkeys(Bottleneck, 0) | {Bottleneck.EXCHANGE: 1, Bottleneck.COMPUTE: 1}


def test_an_absurd_speed_in_one_status_stays_in_its_bounds() -> None:
    absurd = PerformanceStatus(share_of_peak=1e300, utilization=-5.0, time_shares=TimeShares(compute=1e9))
    families = job_metrics([job(phase=Phase.RUNNING, performance=absurd)], NOW)
    found = {family.name: family.samples[0].value for family in families if family.samples}
    assert (found["finetune_share_of_peak_ratio"], found["finetune_device_utilization_ratio"]) == (10, 0)
    assert found["finetune_step_time_ratio"] == 1
