"""The newest beat of each pod, by job: what the coordinator fills and the cluster reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from types import MappingProxyType

from finetune_contract.heartbeat import Heartbeat
from finetune_operator.cluster.kube.watch.memory import lean
from finetune_operator.cluster.kube.work.urgency import Urgency, beat_news
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.coordinator.beats import BeatBook
from finetune_operator.plan.model.types import ReceivedHeartbeat


class JobBeats(BeatBook):
    """A book for thousands of jobs: each is read without a look at the others, and its news are told by urgency."""

    def __init__(self, told: Callable[[JobKey, Urgency], None]) -> None:
        super().__init__()
        self._told = told
        self._jobs: dict[JobKey, dict[str, ReceivedHeartbeat]] = {}
        self._waiting: set[str] = set()
        self.num_taken = 0
        """Beats that were kept so far."""

    def take(self, beat: Heartbeat, received_at: datetime) -> bool:
        """Keep a beat unless a newer one of its pod is there; say whether it was news."""
        key = JobKey(beat.namespace, beat.job)
        pods = self._jobs.setdefault(key, {})
        known = pods.get(beat.pod_uid)
        if known is not None and beat.sequence <= known.beat.sequence:
            return False
        self.num_taken += 1
        pods[beat.pod_uid] = ReceivedHeartbeat(lean(beat), received_at)
        (self._waiting.add if beat.waiting else self._waiting.discard)(beat.pod_uid)
        urgency = beat_news(known.beat if known else None, beat)
        if urgency is not Urgency.NEVER:
            self._told(key, urgency)
        return urgency is not Urgency.NEVER

    def of(self, namespace: str, job: str, oldest_attempt: int = 0) -> Mapping[str, ReceivedHeartbeat]:
        """The newest beats of a job's pods, by UID: a copy. What older attempts said is dropped for good."""
        pods = self._jobs.get(JobKey(namespace, job), {})
        for uid in [uid for uid, got in pods.items() if got.beat.attempt < oldest_attempt]:
            del pods[uid]
            self._waiting.discard(uid)
        return MappingProxyType(dict(pods))

    @property
    def num_waiting(self) -> int:
        """Pods whose ranks wait for a new world."""
        return len(self._waiting)

    def heard_at(self, key: JobKey, pod_uid: str) -> datetime | None:
        """When a pod was last heard."""
        got = self._jobs.get(key, {}).get(pod_uid)
        return got.received_at if got is not None else None

    def forget(self, key: JobKey) -> None:
        """Drop all beats of a job that is gone."""
        self._waiting.difference_update(self._jobs.pop(key, {}))
