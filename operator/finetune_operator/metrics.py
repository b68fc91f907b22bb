"""Prometheus metrics of the operator. No label names a job, a pod or a node: their number has no bound.

`Metrics` is told of requests and passes; what holds at the moment of a scrape is read from the cluster's caches.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from finetune_contract.phase import Phase
from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.job import AttemptStatus, CheckpointStatus, FineTuneJob, FineTuneJobStatus
from finetune_operator.cluster.kube.client.client import ApiError
from finetune_operator.cluster.kube.operator import Operator
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.cluster.reconcile import Pass
from finetune_operator.plan.report.conditions import is_true

RUNNING = frozenset({Phase.RUNNING, Phase.EXPORTING})
PASS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
RECOVERY_BUCKETS = (1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """All metrics of one operator."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "finetune_api_requests",
            "Requests to the API server, watches included.",
            ("method", "resource", "code"),
            registry=self.registry,
        )
        self._pass_seconds = Histogram(
            "finetune_reconcile_seconds", "Time of one pass.", buckets=PASS_BUCKETS, registry=self.registry
        )
        self._errors = Counter(
            "finetune_reconcile_errors", "Passes that broke off, by what broke.", ("kind",), registry=self.registry
        )
        self._history = History(self.registry)

    def look_at(self, operator: Operator) -> None:
        """Read an operator's caches at every scrape."""
        self.registry.register(State(operator))

    def before(self, method: str, path: str) -> None:
        """A request is about to be sent: counted when it is answered, a watch at once."""
        if method == "WATCH":
            self._requests.labels(method, resource_of(path), "").inc()

    def after(self, method: str, path: str, status: int, seconds: float) -> None:
        """A request was answered; 0: it was not."""
        del seconds
        self._requests.labels(method, resource_of(path), str(status)).inc()

    def passed(self, key: JobKey, seen: Pass, seconds: float) -> None:
        """A pass succeeded."""
        self._pass_seconds.observe(seconds)
        self._history.see(key, seen.job)

    def failed(self, key: JobKey, error: Exception, seconds: float) -> None:
        """A pass broke off."""
        del key
        self._pass_seconds.observe(seconds)
        self._errors.labels("api" if isinstance(error, ApiError) else "bug").inc()


def resource_of(path: str) -> str:
    """The kind of object that a request is about, e.g. 'pods' or 'finetunejobs/status'."""
    parts = path.strip("/").split("/")
    # api/v1/... or apis/<group>/<version>/..., then perhaps namespaces/<name>.
    parts = parts[2:] if parts[0] == "api" else parts[3:]
    if len(parts) > 2 and parts[0] == "namespaces":
        parts = parts[2:]
    return "/".join(parts[::2])


class _Known(NamedTuple):
    """What was counted of a job already."""

    uid: str
    ended: int
    """The newest attempt whose end was counted."""
    trained: int
    """The newest attempt whose first step was counted."""
    lost_steps: int
    corrupt_checkpoints: int


class History:
    """Counters of what happened to attempts, from the ledgers. What was there before this process is not counted."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._known: dict[JobKey, _Known] = {}
        self._ended = Counter(
            "finetune_attempts_ended", "Attempts that ended, by cause.", ("reason",), registry=registry
        )
        self._lost_steps = Counter("finetune_lost_steps", "Steps that had to be trained again.", registry=registry)
        self._corrupt = Counter(
            "finetune_corrupt_checkpoints", "Checkpoints that were found damaged and set aside.", registry=registry
        )
        self._recovery = Histogram(
            "finetune_recovery_seconds",
            "Time from the end of an attempt to the first step of the next one: all of it, and each part of it.",
            ("part",),
            buckets=RECOVERY_BUCKETS,
            registry=registry,
        )

    def see(self, key: JobKey, job: FineTuneJob | None) -> None:
        """Take the status after a pass."""
        if job is None:
            self._known.pop(key, None)
            return
        status = job.status
        new = _Known(
            job.metadata.uid,
            _newest(status, "reason"),
            _newest(status, "training_at"),
            status.lost_steps,
            status.corrupt_checkpoints or 0,
        )
        known = self._known.get(key)
        self._known[key] = new
        if known is None or known.uid != new.uid:
            return
        self._lost_steps.inc(max(0, new.lost_steps - known.lost_steps))
        self._corrupt.inc(max(0, new.corrupt_checkpoints - known.corrupt_checkpoints))
        for previous, entry in zip((None, *status.attempts), status.attempts, strict=False):
            if entry.attempt > known.ended and entry.reason is not None:
                self._ended.labels(entry.reason).inc()
            if entry.attempt > known.trained and entry.training_at is not None and previous is not None:
                self._count_recovery(previous, entry)

    def _count_recovery(self, previous: AttemptStatus, entry: AttemptStatus) -> None:
        if previous.ended_at is None or entry.training_at is None:
            return
        parts = dict(entry.seconds) | {"detection": previous.seconds.detection}
        parts["all"] = (entry.training_at - previous.ended_at).total_seconds()
        for part, seconds in parts.items():
            if seconds is not None:
                self._recovery.labels(part).observe(seconds)


def _newest(status: FineTuneJobStatus, field: str) -> int:
    """The newest attempt of which something is known."""
    return max((entry.attempt for entry in status.attempts if getattr(entry, field) is not None), default=0)


class State(Collector):
    """What holds now, over all jobs."""

    def __init__(self, operator: Operator) -> None:
        self._operator = operator

    def describe(self) -> Iterator[Metric]:
        """Nothing: it could be read only once the operator has started."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Read the caches."""
        term = self._operator.term
        leads = term is not None and term.works
        yield GaugeMetricFamily("finetune_leader", "1 where this replica leads.", value=float(leads))
        if term is None or not leads:
            return
        yield GaugeMetricFamily("finetune_queue_depth", "Jobs that wait for a pass.", value=term.queue.depth)
        yield CounterMetricFamily("finetune_beats", "Beats that were taken.", value=term.cluster.beats.num_taken)
        yield from job_metrics([kept.job for kept in term.cluster.jobs.values() if kept.job], datetime.now(UTC))


def job_metrics(jobs: list[FineTuneJob], now: datetime) -> Iterator[Metric]:
    """Gauges over jobs. Pure."""
    phases = Tally((job.status.phase or Phase.PENDING, job.spec.training.method or "script") for job in jobs)
    number = GaugeMetricFamily(
        "finetune_jobs", "Jobs, by phase and method; script: of a script of the user's.", labels=("phase", "method")
    )
    for (phase, method), count in phases.items():
        number.add_metric((phase, method), count)
    yield number
    running = [job.status for job in jobs if job.status.phase in RUNNING]
    yield GaugeMetricFamily(
        "finetune_images_per_second",
        "Images that all running jobs train in a second.",
        value=sum(status.images_per_second or 0.0 for status in running),
    )
    goodputs = [status.goodput for status in running if status.goodput is not None]
    if goodputs:
        mean = sum(goodputs) / len(goodputs)
        yield GaugeMetricFamily("finetune_goodput_ratio", "Mean goodput of the running jobs.", value=mean)
    checkpoints = [status.last_checkpoint for status in running if status.last_checkpoint is not None]
    yield GaugeMetricFamily(
        "finetune_checkpoint_bytes",
        "Size of the newest checkpoints of the running jobs, together.",
        value=sum(checkpoint.bytes for checkpoint in checkpoints),
    )
    yield from _save_costs(checkpoints)
    stale = sum(is_true(status, ConditionType.CHECKPOINT_STALE) for status in running)
    yield GaugeMetricFamily(
        "finetune_checkpoint_stale_jobs", "Running jobs that cannot write a newer checkpoint.", value=stale
    )
    if checkpoints:
        oldest = min(checkpoint.time for checkpoint in checkpoints)
        yield GaugeMetricFamily(
            "finetune_oldest_checkpoint_age_seconds",
            "Age of the oldest of them: what the unluckiest job would lose.",
            value=max(0.0, (now - oldest).total_seconds()),
        )


def _save_costs(checkpoints: list[CheckpointStatus]) -> Iterator[Metric]:
    """What the newest checkpoints cost: the mean, for their number has no bound."""
    for name, what, figures in (
        (
            "finetune_checkpoint_stall_seconds",
            "Mean time for which training stood still for the newest checkpoints of the running jobs.",
            [checkpoint.stall_seconds for checkpoint in checkpoints if checkpoint.stall_seconds is not None],
        ),
        (
            "finetune_checkpoint_durable_seconds",
            "Mean time from their step until they were verified.",
            [checkpoint.save_seconds for checkpoint in checkpoints if checkpoint.save_seconds is not None],
        ),
    ):
        if figures:
            yield GaugeMetricFamily(name, what, value=sum(figures) / len(figures))
