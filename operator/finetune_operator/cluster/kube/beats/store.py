"""The newest heartbeat of each pod, by job. The coordinator writes it, the cluster reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from types import MappingProxyType

from finetune_contract.heartbeat import Heartbeat
from finetune_operator.cluster.kube.client.memory import compact
from finetune_operator.cluster.kube.work.urgency import Urgency, classify_heartbeat
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.coordinator.beats import HeartbeatStore
from finetune_operator.plan.model.types import ReceivedHeartbeat


class JobHeartbeats(HeartbeatStore):
    """A store for thousands of jobs: heartbeats are indexed by job, and each change wakes its job by urgency."""

    def __init__(self, wake: Callable[[JobKey, Urgency], None]) -> None:
        super().__init__()
        self._wake = wake
        self._jobs: dict[JobKey, dict[str, ReceivedHeartbeat]] = {}
        self._waiting: set[str] = set()
        self.num_received = 0
        """Number of heartbeats stored so far."""

    def record(self, beat: Heartbeat, received_at: datetime) -> bool:
        """Store a heartbeat unless a newer one of its pod is stored; return whether it contains a change."""
        key = JobKey(beat.namespace, beat.job)
        pods = self._jobs.setdefault(key, {})
        known = pods.get(beat.pod_uid)
        if known is not None and beat.sequence <= known.beat.sequence:
            return False
        self.num_received += 1
        pods[beat.pod_uid] = ReceivedHeartbeat(compact(beat), received_at)
        (self._waiting.add if beat.waiting or beat.joining else self._waiting.discard)(beat.pod_uid)
        urgency = classify_heartbeat(known.beat if known else None, beat)
        if urgency is not Urgency.NEVER:
            self._wake(key, urgency)
        return urgency is not Urgency.NEVER

    def of_job(self, namespace: str, job: str, oldest_attempt: int = 0) -> Mapping[str, ReceivedHeartbeat]:
        """Return a copy of the newest heartbeats of a job's pods, by UID. Drop those of older attempts."""
        pods = self._jobs.get(JobKey(namespace, job), {})
        for uid in [uid for uid, got in pods.items() if got.beat.attempt < oldest_attempt]:
            del pods[uid]
            self._waiting.discard(uid)
        return MappingProxyType(dict(pods))

    @property
    def num_waiting(self) -> int:
        """Number of pods whose ranks wait for a new world."""
        return len(self._waiting)

    def received_at(self, key: JobKey, pod_uid: str) -> datetime | None:
        """Return when a pod's newest heartbeat was received."""
        got = self._jobs.get(key, {}).get(pod_uid)
        return got.received_at if got is not None else None

    def forget(self, key: JobKey) -> None:
        """Drop all heartbeats of a deleted job."""
        self._waiting.difference_update(self._jobs.pop(key, {}))
