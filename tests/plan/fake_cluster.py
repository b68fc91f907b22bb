"""A tiny cluster for the plan's tests: jobs, pods and beats as values, and a cluster of them that carries plans out.

It has no clock but its own. Pods appear when they are asked for, show up in the list when the test says so, and obey
deletions as Kubernetes does.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import CommittedCheckpoint, Heartbeat, RankEnd, RankReport, RankState, Termination
from finetune_operator.api import labels
from finetune_operator.api.job import FineTuneJob
from finetune_operator.plan import plan
from finetune_operator.plan.model.types import (
    Create,
    DeleteJob,
    DeletePod,
    Event,
    Observed,
    ObservedPod,
    Plan,
    PodPhase,
    ReceivedHeartbeat,
    Refusal,
)
from finetune_operator.settings import Settings

START = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
SETTINGS = Settings(coordinator_url="http://coordinator", require_storage=False, hold_seconds=0)
"""Whole gangs; test_in_place is about the others."""


def make_job(**spec: Any) -> FineTuneJob:
    """A job of two CPU nodes with one rank each; top-level fields of the spec may be given."""
    manifest = {
        "metadata": {"name": "circles", "uid": "1f0c3a2b-0000", "generation": 1},
        "spec": {
            "model": {"base": "base"},
            "dataset": {"source": "data"},
            "training": {"method": "LoRA", "steps": 100},
            "topology": {"accelerator": "cpu", "nodes": 2},
        }
        | spec,
    }
    return FineTuneJob.model_validate(manifest)


def seconds(number: float) -> timedelta:
    return timedelta(seconds=number)


@dataclass
class FakeCluster:
    """One job and all that exists of it."""

    job: FineTuneJob = field(default_factory=make_job)
    settings: Settings = SETTINGS
    now: datetime = START
    pods: dict[str, ObservedPod] = field(default_factory=dict)
    """By name: what really exists."""
    hidden: set[str] = field(default_factory=set)
    """UIDs of pods that the list does not show yet."""
    beats: dict[str, ReceivedHeartbeat] = field(default_factory=dict)
    services: set[str] = field(default_factory=set)
    configs: set[str] = field(default_factory=set)
    events: list[Event] = field(default_factory=list)
    made: dict[str, Any] = field(default_factory=dict)
    """Manifests of all pods, by name."""
    refusal: Refusal | None = None
    """What the API server said last to a pod of the job; it takes none then."""
    deleted: bool = False
    num_created: int = 0
    sequence: int = 0

    # what the cluster does

    def observed(self) -> Observed:
        return Observed(
            pods=tuple(pod for pod in self.pods.values() if pod.uid not in self.hidden),
            beats=dict(self.beats),
            services=frozenset(self.services),
            configs=frozenset(self.configs),
            refusal=self.refusal,
        )

    def decide(self) -> Plan:
        return plan(self.job, self.observed(), self.now, self.settings)

    def step(self) -> Plan:
        """One pass: decide, write the status, act, tell."""
        decided = self.decide()
        self.job = self.job.model_copy(update={"status": decided.status})
        for action in decided.actions:
            self.apply(action)
        self.events += decided.events
        return decided

    def settle(self, max_passes: int = 20) -> Plan:
        """Passes until one changes nothing; no time goes by."""
        for _ in range(max_passes):
            before = self.job.status
            decided = self.step()
            if decided.status == before and not decided.actions:
                return decided
        raise AssertionError(f"no rest after {max_passes} passes: {decided}")

    def apply(self, action: Create | DeletePod | DeleteJob) -> None:
        if isinstance(action, Create):
            self.create(action.manifest)
        elif isinstance(action, DeletePod):
            self.delete(action.name, action.uid, action.grace_seconds)
        else:
            self.deleted = True

    def create(self, manifest: Any) -> None:
        name = manifest["metadata"]["name"]
        if manifest["kind"] == "Pod":
            if name in self.pods or self.refusal is not None:
                return
            self.num_created += 1
            own = manifest["metadata"]["labels"]
            self.made[name] = manifest
            self.pods[name] = ObservedPod(
                name=name,
                uid=f"uid-{self.num_created}",
                attempt=int(own[labels.ATTEMPT]),
                node_rank=int(own[labels.NODE_RANK]),
                phase=PodPhase.PENDING,
                created_at=self.now,
                fell_back=labels.CAPACITY in own,
            )
        else:
            (self.services if manifest["kind"] == "Service" else self.configs).add(name)

    def delete(self, name: str, uid: str, grace_seconds: int | None) -> None:
        pod = self.pods.get(name)
        if pod is None or pod.uid != uid:
            return
        if pod.phase in (PodPhase.SUCCEEDED, PodPhase.FAILED) or pod.node is None:
            self.vanish(name)
            return
        own = seconds(self.job.spec.recovery.notice_seconds)
        grace = own if grace_seconds is None else seconds(grace_seconds)
        if pod.deleted_at is not None:
            grace = min(grace, pod.grace)
        self.pods[name] = replace(pod, deleted_at=pod.deleted_at or self.now, grace=grace)

    # what happens to pods

    def pod(self, node_rank: int) -> ObservedPod:
        """The pod of a node rank in the newest attempt."""
        return self.pods[f"circles-a{self.job.status.attempt}-n{node_rank}"]

    def change(self, node_rank: int, **changes: Any) -> None:
        pod = replace(self.pod(node_rank), **changes)
        self.pods[pod.name] = pod

    def vanish(self, name: str) -> None:
        pod = self.pods.pop(name)
        self.beats.pop(pod.uid, None)

    def run_all(self) -> None:
        """All pods of the newest attempt are placed and started."""
        for pod in list(self.pods.values()):
            if pod.attempt == self.job.status.attempt and pod.phase is PodPhase.PENDING:
                self.pods[pod.name] = replace(pod, phase=PodPhase.RUNNING, node=f"node-{pod.node_rank}", ready=True)

    def exit(self, node_rank: int, code: int, **changes: Any) -> None:
        """A pod's container ends."""
        phase = PodPhase.SUCCEEDED if code == 0 else PodPhase.FAILED
        self.change(node_rank, phase=phase, exit_code=code, ready=False, finished_at=self.now, **changes)

    def tick(self, number: float) -> None:
        """Time goes by; pods whose grace is over are gone."""
        self.now += seconds(number)
        for pod in list(self.pods.values()):
            if pod.deleted_at is not None and pod.deleted_at + pod.grace <= self.now:
                self.vanish(pod.name)

    # what supervisors say

    def beat(self, node_rank: int, state: RankState = RankState.TRAINING, **report: Any) -> None:
        """A supervisor with one rank beats."""
        told = {key: report.pop(key) for key in ("notice", "ends", "waiting") if key in report}
        pod = self.pod(node_rank)
        self._say(pod, pod.attempt, node_rank, (RankReport(rank=node_rank, state=state, **report),), told)

    def say(self, pod: ObservedPod, rank: int | None, **report: Any) -> None:
        """A supervisor beats that trains as this rank of the newest attempt; None: it stands by."""
        told = {"waiting": report.pop("waiting", False) or rank is None}
        attempt = pod.attempt if told["waiting"] else self.job.status.attempt
        reports = () if rank is None else (RankReport(rank=rank, state=RankState.TRAINING, restored_step=0, **report),)
        self._say(pod, attempt, pod.node_rank if rank is None else rank, reports, told)

    def _say(self, pod: ObservedPod, attempt: int, node_rank: int, ranks: tuple[RankReport, ...], told: Any) -> None:
        self.sequence += 1
        beat = Heartbeat(
            job="circles",
            namespace="default",
            job_uid=self.job.metadata.uid,
            pod=pod.name,
            pod_uid=pod.uid,
            attempt=attempt,
            node_rank=node_rank,
            sequence=self.sequence,
            ranks=ranks,
            **told,
        )
        self.beats[pod.uid] = ReceivedHeartbeat(beat, self.now)

    def beat_all(self, state: RankState = RankState.TRAINING, **report: Any) -> None:
        for node_rank in range(self.job.spec.topology.nodes or 1):
            self.beat(node_rank, state, **report)

    def train_to(self, step: int, *, from_step: int = 0, checkpoint: int | None = None) -> None:
        """Ranks report a step, and rank 0 a checkpoint of this attempt."""
        self.beat_all(step=step, restored_step=from_step, total_steps=100)
        if checkpoint is not None:
            committed = CommittedCheckpoint(
                step=checkpoint,
                time=self.now.timestamp(),
                size_bytes=1000,
                attempt=self.job.status.attempt,
            )
            self.beat(0, step=step, restored_step=from_step, total_steps=100, checkpoint=committed)

    # what a test wants in one line

    def running(self) -> FakeCluster:
        """Bring the next attempt's pods up."""
        self.settle()
        self.run_all()
        self.settle()
        return self

    def created(self) -> FakeCluster:
        """The first attempt's pods have just been created; no pass has seen them yet."""
        self.step()
        self.step()
        return self

    def reasons(self) -> list[str]:
        return [str(event.reason) for event in self.events]


def last_words(attempt: int, code: int, words: str, *, rank: int = 0, step: int | None = None) -> Termination:
    return Termination(
        attempt=attempt, exit_code=code, step=step, ends=(RankEnd(rank=rank, exit_code=code, last_words=words),)
    )


__all__ = ["ExitCode", "FakeCluster", "RankState", "last_words", "make_job", "seconds"]
