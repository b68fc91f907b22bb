"""A fake cluster for the tests of the plan: one job, its pods and heartbeats as plain data. It carries out plans.

Its clock moves only when a test moves it. Pods exist as soon as they are created, appear in the list when the test
allows it, and are deleted like in Kubernetes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import (
    CommittedCheckpoint,
    Heartbeat,
    RankEnd,
    RankReport,
    RankState,
    Reply,
    Termination,
)
from finetune_contract.outputs.request import ExportResult
from finetune_operator.api import labels
from finetune_operator.api.gangs import GATE, POD_GROUP
from finetune_operator.api.job import FineTuneJob, SchedulingMode
from finetune_operator.api.kueue import WORKLOAD
from finetune_operator.cluster.observe import observe_pod
from finetune_operator.cluster.observe_workload import Flavor
from finetune_operator.plan import plan
from finetune_operator.plan.model.types import (
    Action,
    Create,
    DeafPeriod,
    DeleteChild,
    DeletePod,
    DeleteWorkload,
    Event,
    Observed,
    ObservedChild,
    ObservedEviction,
    ObservedExport,
    ObservedNode,
    ObservedPod,
    OpenGate,
    PatchWorkload,
    Plan,
    PodPhase,
    ReceivedHeartbeat,
    Refusal,
    ReportEviction,
    ResizePod,
    split_exports,
)
from finetune_operator.plan.replies import reply_to
from finetune_operator.settings import Settings
from testing.simulated.workloads import WorkloadStore, observe

OPTIONAL = {POD_GROUP, "PodDisruptionBudget"}
START = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
SETTINGS = Settings(coordinator_url="http://coordinator", require_storage=False, hold_seconds=0)
"""Settings without recovery in place; `scenarios.HOLDING` enables it."""


def make_job(**spec: Any) -> FineTuneJob:
    """Return a job of two CPU nodes with one rank each; the arguments replace top-level fields of the spec."""
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


def _memory_of(pod: Any) -> str | None:
    limits = pod["spec"]["containers"][0]["resources"].get("limits", {})
    memory: str | None = limits.get("memory")
    return memory


def seconds(number: float) -> timedelta:
    return timedelta(seconds=number)


@dataclass
class FakeCluster:
    """One job and all objects that belong to it."""

    job: FineTuneJob = field(default_factory=make_job)
    settings: Settings = SETTINGS
    now: datetime = START
    pods: dict[str, ObservedPod] = field(default_factory=dict)
    """Existing pods, by name."""
    hidden: set[str] = field(default_factory=set)
    """UIDs of pods that the list does not contain yet."""
    beats: dict[str, ReceivedHeartbeat] = field(default_factory=dict)
    services: set[str] = field(default_factory=set)
    configs: set[str] = field(default_factory=set)
    nodes: dict[str, ObservedNode] = field(default_factory=dict)
    """Nodes that are not healthy."""
    events: list[Event] = field(default_factory=list)
    manifests: dict[str, Any] = field(default_factory=dict)
    """Manifests of all pods, by name."""
    refusal: Refusal | None = None
    """The current refusal of the API server to create pods; None: it accepts them."""
    num_admitted: int = 0
    """Number of pods that it creates despite the refusal."""
    create_after: datetime | None = None
    listening_since: datetime | None = None
    deaf: list[DeafPeriod] = field(default_factory=list)
    deleted: bool = False
    queue: WorkloadStore = field(default_factory=WorkloadStore)
    """The job's requests to its queue; the test decides about them."""
    flavors: dict[str, Flavor] = field(default_factory=dict)
    queues_served: bool = True
    gang_apis: dict[SchedulingMode, str] = field(default_factory=dict)
    optional_apis: frozenset[str] = frozenset()
    evictions: dict[str, ObservedEviction] = field(default_factory=dict)
    """By name."""
    reports: list[ReportEviction] = field(default_factory=list)
    """Reports about evictions, oldest first."""
    children: dict[str, ObservedChild] = field(default_factory=dict)
    """PodGroups and other optional objects, by kind and name."""
    num_created: int = 0
    sequence: int = 0

    # the cluster

    def observed(self) -> Observed:
        pods, exports = split_exports(pod for pod in self.pods.values() if pod.uid not in self.hidden)
        return Observed(
            pods=pods,
            exports=exports,
            beats=dict(self.beats),
            services=frozenset(self.services),
            configs=frozenset(self.configs),
            nodes=dict(self.nodes),
            refusal=self.refusal,
            create_after=self.create_after,
            listening_since=self.listening_since,
            deaf=tuple(self.deaf),
            workloads=tuple(observe(thing, self.flavors) for thing in self.queue.stored.values()),
            queues_served=self.queues_served,
            gang_apis=dict(self.gang_apis),
            optional_apis=self.optional_apis,
            evictions=tuple(self.evictions.values()),
            children=tuple(self.children.values()),
        )

    def pause(self, number: float) -> None:
        """Move the clock while the operator cannot receive heartbeats."""
        self.deaf.append(DeafPeriod(self.now, self.now + seconds(number)))
        self.now += seconds(number)

    def decide(self) -> Plan:
        return plan(self.job, self.observed(), self.now, self.settings)

    def step(self) -> Plan:
        """Reconcile once: decide, write the status, carry out the actions, record the events."""
        decided = self.decide()
        self.job = self.job.model_copy(update={"status": decided.status})
        for action in decided.actions:
            self.apply(action)
        self.events += decided.events
        return decided

    def settle(self, max_reconciles: int = 20) -> Plan:
        """Reconcile until nothing changes; the clock does not move."""
        for _ in range(max_reconciles):
            before = self.job.status
            decided = self.step()
            if decided.status == before and not decided.actions:
                return decided
        raise AssertionError(f"not settled after {max_reconciles} reconciles: {decided}")

    def settle_refused(self, max_reconciles: int = 20) -> None:
        """Reconcile until the status does not change, while the cluster refuses creations."""
        for _ in range(max_reconciles):
            before = self.job.status
            self.step()
            if self.job.status == before:
                return
        raise AssertionError(f"not settled after {max_reconciles} reconciles")

    def apply(self, action: Action) -> None:
        if isinstance(action, Create):
            self.create(action.manifest)
        elif isinstance(action, DeletePod):
            self.delete(action.name, action.uid, action.grace_seconds)
        elif isinstance(action, PatchWorkload):
            self.queue.patch(action)
        elif isinstance(action, DeleteWorkload):
            self.queue.delete(action.name, action.uid)
        elif isinstance(action, OpenGate):
            self.pods[action.name] = replace(self.pods[action.name], gated=False)
        elif isinstance(action, ReportEviction):
            self.reports.append(action)
            old = self.evictions[action.name]
            self.evictions[action.name] = replace(old, reported_at=self.now, completed=action.done)
        elif isinstance(action, DeleteChild):
            del self.children[f"{action.child.kind} {action.child.name}"]
        elif isinstance(action, ResizePod):
            self.pods[action.name] = replace(self.pods[action.name], memory=action.memory)
        else:
            self.deleted = True

    def create(self, manifest: Any) -> None:
        name = manifest["metadata"]["name"]
        if manifest["kind"] == "Pod":
            if name in self.pods or (self.refusal is not None and len(self.pods) >= self.num_admitted):
                return
            self.num_created += 1
            own = manifest["metadata"]["labels"]
            is_export = labels.EXPORT in own
            self.manifests[name] = manifest
            self.pods[name] = ObservedPod(
                name=name,
                uid=f"uid-{self.num_created}",
                attempt=0 if is_export else int(own[labels.ATTEMPT]),
                node_rank=0 if is_export else int(own[labels.NODE_RANK]),
                phase=PodPhase.PENDING,
                created_at=self.now,
                fell_back=labels.CAPACITY in own,
                memory=_memory_of(manifest),
                template=own[labels.TEMPLATE],
                gated={"name": GATE} in manifest["spec"].get("schedulingGates", ()),
                export=ObservedExport(own[labels.EXPORT]) if is_export else None,
            )
        elif manifest["kind"] == WORKLOAD:
            self.queue.create(manifest, self.now)
        elif manifest["kind"] in OPTIONAL:
            self.manifests[f"{manifest['kind']} {name}"] = manifest
            number = int(manifest["metadata"]["labels"][labels.ATTEMPT])
            child = ObservedChild(manifest["apiVersion"], manifest["kind"], name, f"uid-{name}", number)
            self.children[f"{manifest['kind']} {name}"] = child
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

    # changes of the job and of pods

    def edit(self, **spec: Any) -> None:
        """Edit the job as a user does; the arguments replace top-level fields of its spec."""
        edited = make_job(**spec)
        meta = self.job.metadata.model_copy(update={"generation": self.job.metadata.generation + 1})
        self.job = self.job.model_copy(update={"spec": edited.spec, "metadata": meta})

    def see(self, node_rank: int, phase: str, statuses: list[Any], init: Sequence[Any] = (), **status: Any) -> None:
        """Show the pod of a node rank as the API server does: the plan reads it as from a real cluster."""
        pod = self.pod(node_rank)
        meta = {"name": pod.name, "uid": pod.uid, "creationTimestamp": pod.created_at.isoformat()}
        meta["labels"] = self.manifests[pod.name]["metadata"]["labels"]
        containers = self.manifests[pod.name]["spec"]["containers"]
        value = {
            "metadata": meta,
            "spec": {"nodeName": f"node-{node_rank}", "containers": containers, "initContainers": list(init)},
            "status": {"phase": phase, "containerStatuses": statuses, "initContainerStatuses": list(init), **status},
        }
        observed = observe_pod(value)
        assert observed is not None
        self.pods[pod.name] = observed

    def pod(self, node_rank: int) -> ObservedPod:
        """Return the pod of a node rank in the newest attempt."""
        return self.pods[f"circles-a{self.job.status.attempt}-n{node_rank}"]

    def request_export(self, text: str) -> None:
        """Write the annotation by which a user requests an export."""
        meta = self.job.metadata.model_copy(update={"annotations": {labels.EXPORT: text}})
        self.job = self.job.model_copy(update={"metadata": meta})

    @property
    def export_pod(self) -> ObservedPod:
        """The export pod."""
        return self.pods["circles-export"]

    def run_export(self) -> None:
        """Start the export pod on a node."""
        self.change_export(phase=PodPhase.RUNNING, node="node-9", waiting=None)

    def end_export(self, code: int, result: ExportResult | None = None, **changes: Any) -> None:
        """End the container of the export pod."""
        export = ObservedExport(self.export_pod.export.content if self.export_pod.export else "", result)
        phase = PodPhase.SUCCEEDED if code == 0 else PodPhase.FAILED
        self.change_export(phase=phase, exit_code=code, finished_at=self.now, export=export, **changes)

    def change_export(self, **changes: Any) -> None:
        self.pods["circles-export"] = replace(self.export_pod, **changes)

    def change(self, node_rank: int, **changes: Any) -> None:
        pod = replace(self.pod(node_rank), **changes)
        self.pods[pod.name] = pod

    def reply(self, beat: Heartbeat, job: FineTuneJob | None = None) -> Reply:
        """Return the reply to a heartbeat."""
        return reply_to(job or self.job, beat, self.settings, self.address_of)

    def address_of(self, name: str) -> str:
        """Return the address of a running pod; otherwise an empty text."""
        return self.pods[name].reachable_at if name in self.pods else ""

    def vanish(self, name: str) -> None:
        pod = self.pods.pop(name)
        self.beats.pop(pod.uid, None)

    def run_all(self) -> None:
        """Schedule and start all pods of the newest attempt."""
        for pod in list(self.pods.values()):
            if pod.attempt == self.job.status.attempt and pod.phase is PodPhase.PENDING:
                placed = replace(pod, node=f"node-{pod.node_rank}", address=f"10.0.{pod.attempt}.{pod.node_rank + 1}")
                self.pods[pod.name] = replace(placed, phase=PodPhase.RUNNING, ready=True)

    def exit(self, node_rank: int, code: int, **changes: Any) -> None:
        """End the container of a pod."""
        phase = PodPhase.SUCCEEDED if code == 0 else PodPhase.FAILED
        self.change(node_rank, phase=phase, exit_code=code, ready=False, finished_at=self.now, **changes)

    def tick(self, number: float) -> None:
        """Advance the clock, and remove the pods whose grace period is over."""
        self.now += seconds(number)
        for pod in list(self.pods.values()):
            if pod.deleted_at is not None and pod.deleted_at + pod.grace <= self.now:
                self.vanish(pod.name)

    # heartbeats

    def beat(self, node_rank: int, state: RankState = RankState.TRAINING, **report: Any) -> None:
        """Send the heartbeat of a supervisor with one rank."""
        names = ("notice", "ends", "waiting", "joining", "gpu_faults")
        fields = {key: report.pop(key) for key in names if key in report}
        pod = self.pod(node_rank)
        self._say(pod, pod.attempt, node_rank, (RankReport(rank=node_rank, state=state, **report),), fields)

    def say(self, pod: ObservedPod, rank: int | None, **report: Any) -> None:
        """Send the heartbeat of a pod that trains as this rank of the newest attempt; None: it is a standby."""
        fields = {"waiting": report.pop("waiting", False) or rank is None}
        attempt = pod.attempt if fields["waiting"] else self.job.status.attempt
        reports = () if rank is None else (RankReport(rank=rank, state=RankState.TRAINING, restored_step=0, **report),)
        self._say(pod, attempt, pod.node_rank if rank is None else rank, reports, fields)

    def _say(self, pod: ObservedPod, attempt: int, node_rank: int, ranks: tuple[RankReport, ...], fields: Any) -> None:
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
            **fields,
        )
        self.beats[pod.uid] = ReceivedHeartbeat(beat, self.now)

    def beat_all(self, state: RankState = RankState.TRAINING, **report: Any) -> None:
        for node_rank in range(self.job.spec.topology.nodes or 1):
            self.beat(node_rank, state, **report)

    def train_to(self, step: int, *, from_step: int = 0, checkpoint: int | None = None) -> None:
        """Report a step from all ranks, and a checkpoint of this attempt from rank 0."""
        self.beat_all(step=step, restored_step=from_step, total_steps=100)
        if checkpoint is not None:
            committed = CommittedCheckpoint(
                step=checkpoint,
                time=self.now.timestamp(),
                size_bytes=1000,
                attempt=self.job.status.attempt,
            )
            self.beat(0, step=step, restored_step=from_step, total_steps=100, checkpoint=committed)

    # shortcuts

    def running(self) -> FakeCluster:
        """Start all pods of the next attempt."""
        self.settle()
        self.run_all()
        self.settle()
        return self

    def created(self) -> FakeCluster:
        """Create the pods of the first attempt; no reconcile has observed them yet."""
        self.step()
        self.step()
        return self

    def reasons(self) -> list[str]:
        return [str(event.reason) for event in self.events]


def last_words(attempt: int, code: int, output: str, *, rank: int = 0, step: int | None = None) -> Termination:
    return Termination(
        attempt=attempt, exit_code=code, step=step, ends=(RankEnd(rank=rank, exit_code=code, last_words=output),)
    )


__all__ = ["ExitCode", "FakeCluster", "RankState", "last_words", "make_job", "seconds"]
