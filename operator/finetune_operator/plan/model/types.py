"""Input and output of `plan`: plain frozen data. A cluster, real or simulated, observes it and carries it out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, NamedTuple

from finetune_contract.heartbeat import Heartbeat, Termination
from finetune_contract.outputs.request import ExportResult
from finetune_operator.api.job import SchedulingMode
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.manifests.admission import Admission

IMAGE_ERRORS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
"""Prefixes of a container's waiting reason if its image cannot be pulled."""
Manifest = Mapping[str, Any]


class PodPhase(StrEnum):
    """Kubernetes' pod phases."""

    PENDING = "Pending"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    UNKNOWN = "Unknown"


@dataclass(frozen=True, slots=True)
class ObservedExport:
    """What only an export pod has."""

    content: str
    """Hash of the request that it was created for."""
    result: ExportResult | None = None
    """Its termination message, if it could write one."""


@dataclass(frozen=True, slots=True)
class ObservedPod:
    """The fields of a pod that the plan reads; the operator keeps no others in memory.

    Phase, readiness and end are those of the trainer's container: sidecars do not decide how a pod ends.
    """

    name: str
    uid: str
    attempt: int
    node_rank: int
    phase: PodPhase
    created_at: datetime
    node: str | None = None
    """Node to which it is scheduled; None: not scheduled yet."""
    scheduled_at: datetime | None = None
    """Time at which it received its node, if known."""
    address: str = ""
    """Its address, once it has one."""
    gated: bool = False
    """Whether it has the operator's scheduling gate: it waits until its gang is complete."""
    deleted_at: datetime | None = None
    """Time of the deletion request (Kubernetes' deletionTimestamp less the grace period)."""
    grace: timedelta = timedelta(0)
    """Its deletion grace period; meaningful while `deleted_at` is set."""
    ready: bool = False
    exit_code: int | None = None
    finished_at: datetime | None = None
    """Time at which its container ended, if known."""
    termination: Termination | None = None
    """The supervisor's termination message, if it could write one."""
    disruption: str | None = None
    """Reason of a True DisruptionTarget condition."""
    reason: str | None = None
    """status.reason of the pod, or the reason of its container: Evicted, OOMKilled, ..."""
    message: str | None = None
    """Explanation of the kubelet, or else of the disruption, why the pod ended."""
    killed: bool = False
    """Whether SIGKILL ended a container with a memory limit before its supervisor could report anything."""
    init_failure: str | None = None
    """Description of the init container that failed, if its trainer did not start."""
    sidecar_failure: str | None = None
    """Description of the sidecars that failed while the trainer was still running."""
    fell_back: bool = False
    """Whether it accepts nodes other than spot although the job requests spot."""
    waiting: str | None = None
    """Reason why a container of it does not run yet: the scheduler's or the kubelet's reason and message."""
    memory: str | None = None
    """Memory limit of its trainer's container; None: it has none."""
    template: str | None = None
    """Hash of the fields of the spec that it was created from; None: created by an older operator."""
    export: ObservedExport | None = None
    """Set for an export pod, which belongs to no attempt: its attempt is 0."""

    @property
    def reachable_at(self) -> str:
        """Return its address while its trainer runs, otherwise an empty text: before that the address may change."""
        return self.address if self.phase is PodPhase.RUNNING else ""


@dataclass(frozen=True, slots=True)
class ReceivedHeartbeat:
    """The newest heartbeat of a pod, and when it arrived by the coordinator's clock."""

    beat: Heartbeat
    received_at: datetime


@dataclass(frozen=True, slots=True)
class DeafPeriod:
    """A time in which this process did not receive the heartbeats that were sent: it had no CPU time, or waited."""

    since: datetime
    until: datetime


@dataclass(frozen=True)
class ObservedNode:
    """The state of a node that is not healthy."""

    lost: bool = False
    """Whether the control plane receives no status from it (Ready is Unknown)."""
    gone: bool = False
    """Whether the API server no longer has this Node."""
    leaving: str = ""
    """Taint or condition that announces the end of the node; empty: none."""
    gpu_fault: str = ""
    """Description of a fault of a GPU that a health tool reports; empty: none."""
    cordoned: bool = False
    """Whether it is cordoned, and nothing announces its end."""


HEALTHY = ObservedNode()
"""A node without a reported problem."""


class WorkloadCondition(NamedTuple):
    """A condition of a Workload."""

    type: str
    status: str
    reason: str
    message: str
    since: str
    """lastTransitionTime, as the API server stores it."""


@dataclass(frozen=True)
class ObservedWorkload:
    """A Workload of a job: its request to a queue, and the answer."""

    name: str
    uid: str
    version: str
    """Resource version, a precondition of status writes."""
    created_at: datetime
    queue: str = ""
    active: bool = True
    num_pods: int = 1
    """Number of requested pods."""
    num_admitted: int | None = None
    """Number of pods for which quota is reserved; None: no quota is reserved."""
    conditions: tuple[WorkloadCondition, ...] = ()
    update: Admission | None = field(default_factory=Admission)
    """What its pods receive from the assigned flavors and the admission checks; None: not known yet."""
    request: str | None = None
    """Hash of the request from which the operator created it; None: another controller created it."""
    replaces: str | None = None
    """Namespace and name of the Workload that it replaces when it is admitted."""
    boost: str | None = None
    """Value of the annotation that raises its priority."""
    is_owned: bool = True
    """Whether the job owns it; a prebuilt one has no owner at first."""


@dataclass(frozen=True)
class ObservedChild:
    """A PodGroup or another optional object of one attempt."""

    api_version: str
    kind: str
    name: str
    uid: str
    attempt: int


@dataclass(frozen=True)
class ObservedEviction:
    """An Eviction that asks for the end of a pod, and names the operator as a responder."""

    name: str
    pod_uid: str
    active: bool
    """Whether it is the operator's turn to act."""
    reported_at: datetime | None = None
    """Time of the operator's last report."""
    completed: bool = False
    """Whether the operator has reported that it is done."""


@dataclass(frozen=True)
class Refusal:
    """An object of the job that the API server refused to create."""

    message: str
    """The refused object and the reason; if the object itself is wrong, also the remedy."""
    hold_until: datetime | None = None
    """Time before which another try is useless, because the object itself is wrong; None: it may be accepted later."""


@dataclass(frozen=True)
class Observed:
    """The last observed state of the cluster. It may be stale, but is never ahead."""

    pods: tuple[ObservedPod, ...] = ()
    """Pods of the attempts."""
    exports: tuple[ObservedPod, ...] = ()
    """Export pods: one at most, unless another one is being deleted."""
    beats: Mapping[str, ReceivedHeartbeat] = field(default_factory=dict)
    """Newest heartbeats, by pod UID."""
    services: frozenset[str] = frozenset()
    """Names of the job's Services that exist."""
    configs: frozenset[str] = frozenset()
    """Names of the job's ConfigMaps that exist."""
    nodes: Mapping[str, ObservedNode] = field(default_factory=dict)
    """Nodes of the job's pods that are not healthy, deleted ones included, by name. All others are healthy."""
    refusal: Refusal | None = None
    """The latest refusal of an object of the current spec; None: none, or an object has been created since."""
    create_after: datetime | None = None
    """Time before which nothing may be created, because a creation failed; None: no failure since the last success."""
    listening_since: datetime | None = None
    """Time since which this process receives heartbeats; None: always."""
    deaf: tuple[DeafPeriod, ...] = ()
    """Times in which heartbeats could not be received; they do not count as silence of a pod."""
    beat_seconds: float = 0.0
    """Heartbeat interval that supervisors currently use, if it is longer than the one in the settings."""
    workloads: tuple[ObservedWorkload, ...] = ()
    """The job's requests to its queue, oldest first."""
    queues_served: bool = True
    """Whether the API server serves Kueue's API; without meaning if `Settings.kueue` is false."""
    gang_apis: Mapping[SchedulingMode, str] = field(default_factory=dict)
    """The API version of each kind of PodGroup that the API server serves."""
    optional_apis: frozenset[str] = frozenset()
    """API versions of the optional objects that the operator may use and the API server serves."""
    evictions: tuple[ObservedEviction, ...] = ()
    """Evictions of the job's pods, also of deleted ones."""
    children: tuple[ObservedChild, ...] = ()
    """PodGroups and other optional objects of the job."""
    claims_served: bool = True
    """Whether the API server serves ResourceClaims (DRA); without meaning for a job that requests none."""


@dataclass(frozen=True)
class Create:
    """Create an object. An object that already exists counts as success."""

    manifest: Manifest


@dataclass(frozen=True)
class DeletePod:
    """Delete a pod, only if it still has this UID. A pod that no longer exists counts as success."""

    name: str
    uid: str
    grace_seconds: int | None = None
    """None: the pod's own grace period."""


@dataclass(frozen=True)
class DeleteJob:
    """Delete the job itself: its TTL has expired."""


@dataclass(frozen=True)
class DeleteWorkload:
    """Delete a Workload, only if it still has this UID. One that no longer exists counts as success."""

    name: str
    uid: str


@dataclass(frozen=True)
class PatchWorkload:
    """Change a Workload by a merge patch. If it has changed since it was observed, another reconcile follows."""

    name: str
    patch: Manifest
    """Contains the UID, and for the status the resource version, as preconditions."""
    status: bool = False
    """Whether the status is changed."""


@dataclass(frozen=True)
class OpenGate:
    """Remove the operator's scheduling gate from a pod, only if it still has this UID."""

    name: str
    uid: str


@dataclass(frozen=True)
class DeleteChild:
    """Delete an optional object, only if it still has its UID. One that no longer exists counts as success."""

    child: ObservedChild


@dataclass(frozen=True)
class ResizePod:
    """Change the memory of a running pod, only if it still has this UID. One that cannot be changed stays as it is."""

    name: str
    uid: str
    memory: str
    """New request and limit of the trainer's container."""


@dataclass(frozen=True)
class ReportEviction:
    """Report the progress of an Eviction."""

    name: str
    message: str
    done: bool = False
    """Whether the operator has nothing left to do: the pod is released."""


Action = (
    Create
    | DeletePod
    | DeleteJob
    | DeleteWorkload
    | PatchWorkload
    | OpenGate
    | DeleteChild
    | ResizePod
    | ReportEviction
)


@dataclass(frozen=True)
class Event:
    """A Kubernetes event for the user. Emitted only after the status was written."""

    reason: str
    message: str
    warning: bool = False


@dataclass(frozen=True)
class Plan:
    """The result of one reconcile: write the status first, then carry out the actions, then emit the events."""

    status: FineTuneJobStatus
    actions: tuple[Action, ...] = ()
    events: tuple[Event, ...] = ()
    requeue_after: timedelta | None = None
    """Delay after which to reconcile again even if nothing happens; None: only when something happens."""


def split_exports(pods: Iterable[ObservedPod]) -> tuple[tuple[ObservedPod, ...], tuple[ObservedPod, ...]]:
    """Return the pods of the attempts, and the export pods."""
    found = tuple(pods)
    exports = tuple(pod for pod in found if pod.export is not None)
    return (tuple(pod for pod in found if pod.export is None) if exports else found), exports
