"""Prometheus metrics of the operator. No label contains a job, a pod or a node: their number is unlimited.

`Metrics` observes requests and reconciles; the current state is read from the cluster's caches at each scrape.
"""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from finetune_contract.heartbeat import MAX_COUNT, MAX_IMAGES_PER_SECOND
from finetune_contract.phase import FINISHED, Phase
from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.reasons import REASONS, Reason, Topic
from finetune_operator.api.status import (
    AttemptSeconds,
    AttemptStatus,
    Bottleneck,
    CheckpointStatus,
    FineTuneJobStatus,
    PerformanceStatus,
    TimeShares,
)
from finetune_operator.cluster.kube.client.client import ApiError
from finetune_operator.cluster.kube.operator import Operator
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.cluster.reconcile import ReconcileResult
from finetune_operator.plan.model.conditions import is_true
from finetune_operator.plan.model.ledger import current

RUNNING = frozenset({Phase.RUNNING, Phase.EXPORTING})
WAITING = frozenset(reason for reason, doc in REASONS.items() if doc.topic is Topic.WAITING) - {
    Reason.SUSPENDING,
    Reason.SUSPENDED,
} | {Reason.INVALID_SPEC, Reason.NOT_SUPPORTED}
"""Reasons of jobs that wait for something that is not the user's wish."""
RECONCILE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
RECOVERY_BUCKETS = (1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800)
API_ERROR, BUG = "api", "bug"
ENDS = frozenset(
    reason
    for reason, doc in REASONS.items()
    if doc.counts_as is not None
    or doc.topic in (Topic.CAPACITY, Topic.REGROUP, Topic.END)
    or reason in (Reason.SUSPENDED, Reason.QUOTA_RELEASED, Reason.GANG_RELEASED)
)
"""Reasons for which an attempt ends."""
PARTS = tuple(AttemptSeconds.model_fields)
"""Phases of a recovery."""


class Metrics:
    """All metrics of one operator."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "finetune_api_requests",
            "Requests to the API server, including watches.",
            ("method", "resource", "code"),
            registry=self.registry,
        )
        self._reconcile_seconds = Histogram(
            "finetune_reconcile_seconds",
            "Duration of a reconcile.",
            buckets=RECONCILE_BUCKETS,
            registry=self.registry,
        )
        self._errors = Counter(
            "finetune_reconcile_errors", "Failed reconciles, by kind of error.", ("kind",), registry=self.registry
        )
        for kind in (API_ERROR, BUG):
            self._errors.labels(kind)
        self._attempts = AttemptCounters(self.registry)

    def register_operator(self, operator: Operator) -> None:
        """Read an operator's caches at every scrape."""
        self.registry.register(ClusterMetrics(operator))

    def before(self, method: str, path: str) -> None:
        """Count a watch when it is sent; other requests are counted when they are answered."""
        if method == "WATCH":
            self._requests.labels(method, resource_of(path), "").inc()

    def after(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count a request by its response; status 0 means no response."""
        del seconds
        self._requests.labels(method, resource_of(path), str(status)).inc()

    def succeeded(self, key: JobKey, result: ReconcileResult, seconds: float) -> None:
        """Record a reconcile that succeeded."""
        self._reconcile_seconds.observe(seconds)
        self._attempts.update(key, result.job)

    def failed(self, key: JobKey, error: Exception, seconds: float) -> None:
        """Record a reconcile that failed."""
        del key
        self._reconcile_seconds.observe(seconds)
        self._errors.labels(API_ERROR if isinstance(error, ApiError) else BUG).inc()


def resource_of(path: str) -> str:
    """Return the resource type that a request path names, for example 'pods' or 'finetunejobs/status'."""
    parts = path.strip("/").split("/")
    # api/v1/... or apis/<group>/<version>/..., optionally followed by namespaces/<name>.
    parts = parts[2:] if parts[0] == "api" else parts[3:]
    if len(parts) > 2 and parts[0] == "namespaces":
        parts = parts[2:]
    return "/".join(parts[::2])


class _Counted(NamedTuple):
    """Values of a job that are already included in the counters."""

    uid: str
    ended: int
    """The newest attempt whose end has been counted."""
    trained: int
    """The newest attempt whose first step has been counted."""
    lost_steps: int
    corrupt_checkpoints: int


class AttemptCounters:
    """Counters of attempts, from the ledgers. Attempts from before the start of this process are not counted."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._counted: dict[JobKey, _Counted] = {}
        self._ended = Counter(
            "finetune_attempts_ended", "Attempts that ended, by cause.", ("reason",), registry=registry
        )
        # Without a sample of 0, increase() would not see the first event of each series after a change of the leader.
        for reason in sorted(ENDS):
            self._ended.labels(reason.value)
        self._lost_steps = Counter("finetune_lost_steps", "Steps that had to be repeated.", registry=registry)
        self._corrupt = Counter(
            "finetune_corrupt_checkpoints", "Checkpoints that were found corrupt and moved away.", registry=registry
        )
        self._recovery = Histogram(
            "finetune_recovery_seconds",
            "Time from the end of an attempt to the first step of the next one.",
            buckets=RECOVERY_BUCKETS,
            registry=registry,
        )
        # A metric of its own: a sum over all series of one metric must not count the same time twice.
        self._recovery_parts = Histogram(
            "finetune_recovery_part_seconds",
            "Duration of each part of a recovery, and of the detection before it.",
            ("part",),
            buckets=RECOVERY_BUCKETS,
            registry=registry,
        )
        for part in PARTS:
            self._recovery_parts.labels(part)

    def update(self, key: JobKey, job: FineTuneJob | None) -> None:
        """Count what has changed in a job's status since the last reconcile."""
        if job is None:
            self._counted.pop(key, None)
            return
        status = job.status
        new = _Counted(
            job.metadata.uid,
            _newest(status, "reason"),
            _newest(status, "training_at"),
            status.lost_steps,
            status.corrupt_checkpoints or 0,
        )
        old = self._counted.get(key)
        self._counted[key] = new
        if old is None or old.uid != new.uid:
            return
        self._lost_steps.inc(max(0, new.lost_steps - old.lost_steps))
        self._corrupt.inc(max(0, new.corrupt_checkpoints - old.corrupt_checkpoints))
        for previous, entry in zip((None, *status.attempts), status.attempts, strict=False):
            if entry.attempt > old.ended and entry.reason is not None:
                self._ended.labels(entry.reason).inc()
            if entry.attempt > old.trained and entry.training_at is not None and previous is not None:
                self._count_recovery(previous, entry)

    def _count_recovery(self, previous: AttemptStatus, entry: AttemptStatus) -> None:
        if previous.ended_at is None or entry.training_at is None:
            return
        parts = dict(entry.seconds) | {"detection": previous.seconds.detection}
        self._recovery.observe((entry.training_at - previous.ended_at).total_seconds())
        for part, seconds in parts.items():
            if seconds is not None:
                self._recovery_parts.labels(part).observe(seconds)


def _newest(status: FineTuneJobStatus, field: str) -> int:
    """Return the newest attempt for which a field is set."""
    return max((entry.attempt for entry in status.attempts if getattr(entry, field) is not None), default=0)


class ClusterMetrics(Collector):
    """Gauges of the current state of all jobs."""

    def __init__(self, operator: Operator) -> None:
        self._operator = operator

    def describe(self) -> Iterator[Metric]:
        """Return nothing: the state is available only after the operator has started."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Read the caches."""
        term = self._operator.term
        leads = term is not None and term.active
        yield GaugeMetricFamily("finetune_leader", "1 if this replica is the leader.", value=float(leads))
        if term is None or not leads:
            return
        yield GaugeMetricFamily("finetune_queue_depth", "Jobs that wait for a reconcile.", value=term.queue.depth)
        yield CounterMetricFamily("finetune_beats", "Heartbeats received.", value=term.cluster.beats.num_received)
        yield from job_metrics([cached.job for cached in term.cluster.jobs.values() if cached.job], datetime.now(UTC))


def job_metrics(jobs: list[FineTuneJob], now: datetime) -> Iterator[Metric]:
    """Return gauges over jobs. Pure."""
    phases = Count((job.status.phase or Phase.PENDING, job.spec.training.method or "script") for job in jobs)
    number = GaugeMetricFamily(
        "finetune_jobs", "Jobs, by phase and method; method is 'script' for user scripts.", labels=("phase", "method")
    )
    for (phase, method), count in phases.items():
        number.add_metric((phase, method), count)
    yield number
    running = [job.status for job in jobs if job.status.phase in RUNNING]
    yield GaugeMetricFamily(
        "finetune_images_per_second",
        "Training throughput of all running jobs, in images per second.",
        value=sum(_speed(status) for status in running),
    )
    yield from _performance_metrics([status.performance for status in running if status.performance is not None])
    yield from _waiting_metrics(jobs, now)
    goodputs = [status.goodput for status in running if status.goodput is not None]
    if goodputs:
        mean = sum(goodputs) / len(goodputs)
        yield GaugeMetricFamily("finetune_goodput_ratio", "Mean goodput of the running jobs.", value=mean)
    checkpoints = [status.last_checkpoint for status in running if status.last_checkpoint is not None]
    yield GaugeMetricFamily(
        "finetune_checkpoint_bytes",
        "Total size of the newest checkpoints of the running jobs.",
        value=sum(checkpoint.bytes for checkpoint in checkpoints),
    )
    yield from _save_costs(checkpoints)
    stale = sum(is_true(status, ConditionType.CHECKPOINT_STALE) for status in running)
    yield GaugeMetricFamily(
        "finetune_checkpoint_stale_jobs", "Running jobs that cannot write checkpoints.", value=stale
    )
    slow = sum(len(status.slow_ranks) for status in running if is_true(status, ConditionType.SLOW_RANKS))
    yield GaugeMetricFamily(
        "finetune_slow_ranks", "Ranks of running jobs that need longer than their peers for the same work.", value=slow
    )
    if checkpoints:
        oldest = min(checkpoint.time for checkpoint in checkpoints)
        yield GaugeMetricFamily(
            "finetune_oldest_checkpoint_age_seconds",
            "Age of the oldest newest checkpoint of the running jobs: the most training that a job could lose.",
            value=max(0.0, (now - oldest).total_seconds()),
        )


def _speed(status: FineTuneJobStatus) -> float:
    """Return the throughput of a job; 0 for a figure in its status that no heartbeat may contain."""
    speed = status.images_per_second
    return speed if speed is not None and 0 <= speed <= MAX_IMAGES_PER_SECOND else 0.0


def _performance_metrics(jobs: list[PerformanceStatus]) -> Iterator[Metric]:
    """Yield means over the running jobs that report their speed, and how many of them each part of a step limits."""
    limited = Count(job.bound_by for job in jobs)
    bound = GaugeMetricFamily("finetune_bound_jobs", "Running jobs, by what limits their speed.", labels=("by",))
    for bottleneck in Bottleneck:
        bound.add_metric((bottleneck,), limited[bottleneck])
    yield bound
    if not jobs:
        return
    parts = GaugeMetricFamily(
        "finetune_step_time_ratio", "Mean share of each part in the steps of the running jobs.", labels=("part",)
    )
    for part in TimeShares.model_fields:
        parts.add_metric((part,), _mean([_bounded(getattr(job.time_shares, part)) for job in jobs]))
    yield parts
    for name, what, figures in (
        (
            "finetune_share_of_peak_ratio",
            "Mean share of the devices' peak performance that the running jobs reach.",
            [_bounded(job.share_of_peak, 10) for job in jobs if job.share_of_peak is not None],
        ),
        (
            "finetune_device_utilization_ratio",
            "Mean share of the time in which the devices of the running jobs are busy.",
            [_bounded(job.utilization) for job in jobs if job.utilization is not None],
        ),
    ):
        if figures:
            yield GaugeMetricFamily(name, what, value=_mean(figures))
    for name, what, sizes in (
        (
            "finetune_device_memory_allocated_bytes",
            "Most memory of tensors on one device of the running jobs.",
            [job.memory_allocated_bytes for job in jobs if job.memory_allocated_bytes is not None],
        ),
        (
            "finetune_device_memory_reserved_bytes",
            "Most memory that a running job has reserved on one GPU.",
            [job.memory_reserved_bytes for job in jobs if job.memory_reserved_bytes is not None],
        ),
    ):
        if sizes:
            yield GaugeMetricFamily(name, what, value=_bounded(max(sizes), MAX_COUNT))


def _mean(figures: list[float]) -> float:
    return sum(figures) / len(figures)


def _bounded(figure: float, largest: float = 1.0) -> float:
    """Return a figure of a status within the range that a heartbeat may contain."""
    return min(largest, max(0.0, figure))


def _waiting_metrics(jobs: list[FineTuneJob], now: datetime) -> Iterator[Metric]:
    """Yield how many jobs are silent, and how long one has waited for its pods."""
    active = [job for job in jobs if job.status.phase not in FINISHED and not job.spec.suspend]
    yield GaugeMetricFamily(
        "finetune_silent_jobs",
        "Jobs with a running pod from which the coordinator receives no heartbeats.",
        value=sum(job.status.reason == Reason.SILENT for job in active),
    )
    since = [_waits_since(job) for job in active if job.status.reason in WAITING]
    waits = [(now - moment).total_seconds() for moment in since if moment is not None]
    yield GaugeMetricFamily(
        "finetune_longest_wait_seconds",
        "Longest time for which a job has waited for its pods, in seconds; 0: none waits.",
        value=max(0.0, *waits) if waits else 0.0,
    )


def _waits_since(job: FineTuneJob) -> datetime | None:
    """Return when the wait of a job began: with the end or the start of its newest attempt, or its creation."""
    entry = current(job.status)
    if entry is None:
        return job.metadata.creation_timestamp
    return entry.ended_at or entry.started_at


def _save_costs(checkpoints: list[CheckpointStatus]) -> Iterator[Metric]:
    """Yield the mean costs of the newest checkpoints; the number of jobs is unlimited, so there is no label per job."""
    for name, what, figures in (
        (
            "finetune_checkpoint_stall_seconds",
            "Mean time for which the newest checkpoints of the running jobs paused training.",
            [checkpoint.stall_seconds for checkpoint in checkpoints if checkpoint.stall_seconds is not None],
        ),
        (
            "finetune_checkpoint_durable_seconds",
            "Mean time from a checkpoint's step until it was verified.",
            [checkpoint.save_seconds for checkpoint in checkpoints if checkpoint.save_seconds is not None],
        ),
    ):
        if figures:
            yield GaugeMetricFamily(name, what, value=sum(figures) / len(figures))
