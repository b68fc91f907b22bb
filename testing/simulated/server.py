"""The API server of the simulation: objects with versions, and watches that lag.

It has the current state. The operator reads it through a `LaggingWatch`: in order, with a delay, and after an
interruption with a list of everything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

from finetune_contract import environment
from finetune_operator.api import labels
from finetune_operator.api.gangs import GATE, POD_GROUP
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.kueue import WORKLOAD
from finetune_operator.api.status import Capacity, FineTuneJobStatus
from finetune_operator.cluster.protocol import ConflictError
from finetune_operator.plan.model.types import (
    HEALTHY,
    Manifest,
    ObservedExport,
    ObservedNode,
    ObservedPod,
    PatchWorkload,
    PodPhase,
)
from testing.simulated.engine import Engine
from testing.simulated.model import SimulatedNode, SimulatedPod, SimulatedStorage, Watchdog
from testing.simulated.queue import SimulatedQueue
from testing.simulated.workloads import Json, job_of

Key = tuple[str, str, str]
"""Kind, job and name of an object."""


class SimulatedApiError(Exception):
    """A call failed, or its response was lost; the request may have been carried out."""


class RefusedError(SimulatedApiError):
    """A quota refused an object."""


class LaggingWatch:
    """The object cache of one operator process, which follows the server with a delay."""

    def __init__(self, engine: Engine, lag_seconds: float, wake: Callable[[str], None]) -> None:
        self.jobs: dict[str, FineTuneJob] = {}
        self.pods: dict[str, dict[str, ObservedPod]] = {}
        """By job and pod name."""
        self.children: dict[str, set[tuple[str, str]]] = {}
        """Kind and name, by job."""
        self.workloads: dict[str, dict[str, Json]] = {}
        """By job and name."""
        self.nodes: dict[str, ObservedNode] = {}
        self.closed = False
        self.lag_seconds = lag_seconds
        self._engine = engine
        self._wake = wake
        self._versions: dict[Key, int] = {}
        self._in_flight: deque[tuple[Key, int, Any]] = deque()
        self._due = 0.0

    def send(self, key: Key, version: int, value: Any) -> None:
        """Send a change. Changes arrive in the order in which they were sent."""
        engine = self._engine
        lag = engine.rng.expovariate(1.0 / self.lag_seconds)
        self._due = max(self._due, engine.time + lag)
        self._in_flight.append((key, version, value))
        engine.after(self._due - engine.time, self._arrive)

    def _arrive(self) -> None:
        if self._in_flight and not self.closed:
            self.take(*self._in_flight.popleft())

    def drop_in_flight(self) -> None:
        """Drop the changes in flight: the connection is interrupted. A relist must follow."""
        self._in_flight.clear()

    def take(self, key: Key, version: int, value: Any) -> None:
        """Store a version of an object, unless a newer one is stored; a value of None means that it was deleted."""
        if version <= self._versions.get(key, 0):
            return
        self._versions[key] = version
        kind, job, name = key
        if kind == "Pod":
            _put(self.pods.setdefault(job, {}), name, value)
        elif kind == WORKLOAD:
            _put(self.workloads.setdefault(job, {}), name, value)
        elif kind == "Job":
            _put(self.jobs, name, value)
        elif kind == "Node":
            _put(self.nodes, name, value)
            for other, pods in self.pods.items():
                if any(pod.node == name for pod in pods.values()):
                    self._wake(other)
            return
        elif value is None:
            self.children.get(job, set()).discard((kind, name))
        else:
            self.children.setdefault(job, set()).add((kind, name))
        self._wake(job)

    def known(self) -> set[Key]:
        """Return the keys of all objects in the cache."""
        keys = {("Job", name, name) for name in self.jobs} | {("Node", "", name) for name in self.nodes}
        keys |= {(WORKLOAD, job, name) for job, things in self.workloads.items() for name in things}
        keys |= {("Pod", job, name) for job, pods in self.pods.items() for name in pods}
        return keys | {(kind, job, name) for job, items in self.children.items() for kind, name in items}


def _put(table: dict[str, Any], name: str, value: Any) -> None:
    if value is None:
        table.pop(name, None)
    else:
        table[name] = value


class SimulatedApiServer:
    """All objects of the cluster."""

    def __init__(self, engine: Engine, watchdog: Watchdog) -> None:
        self.engine = engine
        self.jobs: dict[str, FineTuneJob] = {}
        self.pods: dict[str, SimulatedPod] = {}
        self.children: set[tuple[str, str, str]] = set()
        """Kind, job, name."""
        self.nodes: dict[str, SimulatedNode] = {}
        self.storage: dict[str, SimulatedStorage] = {}
        """By job; it does not depend on any node."""
        self.watches: list[LaggingWatch] = []
        self.group_sizes: dict[str, int] = {}
        """Number of pods that the scheduler places together, by PodGroup."""
        self.quota: int | None = None
        """Maximum number of pods; None: no limit."""
        self.queue = SimulatedQueue(engine, self._workload_changed)
        self.queue.released = watchdog.quota_released
        self.num_writes = 0
        """Number of write requests from the operator."""
        self.pod_changed: Callable[[SimulatedPod], None] = lambda _: None
        """Called when a pod was created or its deletion was requested; set by the kubelets."""
        self.gate_opened: Callable[[], None] = lambda: None
        """Called when a scheduling gate was removed; set by the kubelets."""
        self._watchdog = watchdog
        self._version = 0
        self._num_created = 0

    def relist(self, watch: LaggingWatch) -> None:
        """Send the current state of everything to a watch."""
        now: dict[Key, Any] = {("Job", name, name): job for name, job in self.jobs.items()}
        now |= {("Pod", pod.job, name): pod.observed for name, pod in self.pods.items()}
        now |= dict.fromkeys(self.children, True)
        now |= {(WORKLOAD, job_of(thing), name): thing for name, thing in self.queue.store.stored.items()}
        now |= {
            ("Node", "", name): state
            for name, node in self.nodes.items()
            if (state := _observed_node(node)) is not None
        }
        for key in watch.known() - set(now):
            watch.take(key, self._next_version(), None)
        for key, value in now.items():
            watch.take(key, self._next_version(), value)

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def put_job(self, job: FineTuneJob) -> None:
        """Create or change a job on behalf of a user."""
        self._store_job(job)

    def write_status(self, job: FineTuneJob, status: FineTuneJobStatus) -> FineTuneJob:
        """Write a status, if the job still has the version from which it was decided."""
        self.num_writes += 1
        stored = self.jobs.get(job.metadata.name)
        if stored is None or stored.metadata.resource_version != job.metadata.resource_version:
            raise ConflictError
        self._watchdog.status_written(stored, status)
        return self._store_job(stored.model_copy(update={"status": status}))

    def delete_job(self, name: str) -> None:
        """Delete a job and everything that it owns."""
        self.num_writes += 1
        if self.jobs.pop(name, None) is None:
            return
        self._send_all(("Job", name, name), None)
        for key in [key for key in self.children if key[1] == name]:
            self.children.discard(key)
            self._send_all(key, None)
        for pod in [pod for pod in self.pods.values() if pod.job == name]:
            self._mark_deleted(pod, None)
        self.queue.delete_of(name)

    def _store_job(self, job: FineTuneJob) -> FineTuneJob:
        version = self._next_version()
        meta = job.metadata.model_copy(update={"resource_version": str(version)})
        job = job.model_copy(update={"metadata": meta})
        self.jobs[job.metadata.name] = job
        self._send_all(("Job", job.metadata.name, job.metadata.name), job, version)
        return job

    # -- pods and other children --------------------------------------------------------------------------------------

    def create(self, job: FineTuneJob, manifest: Manifest) -> tuple[Key, int, Any]:
        """Create an object, unless it exists already; return its key, its version and its observed state."""
        self.num_writes += 1
        kind, meta = manifest["kind"], manifest["metadata"]
        key = (kind, job.metadata.name, meta["name"])
        if job.metadata.name not in self.jobs:
            raise SimulatedApiError("its owner does not exist")
        if kind == WORKLOAD:
            thing = self.queue.create(job.metadata.name, manifest)
            return key, self._version, thing
        if kind != "Pod":
            if key not in self.children:
                self.children.add(key)
                self._send_all(key, True)
                if kind == POD_GROUP:
                    self.group_sizes[meta["name"]] = manifest["spec"]["schedulingPolicy"]["gang"]["minCount"]
            return key, self._version, True
        if (known := self.pods.get(meta["name"])) is not None:
            return key, self._version, known.observed
        if self.quota is not None and len(self.pods) >= self.quota:
            raise RefusedError("exceeded quota")
        self._num_created += 1
        spec = manifest["spec"]
        env = {item["name"]: item.get("value") for item in spec["containers"][0]["env"]}
        own = meta["labels"]
        observed = ObservedPod(
            name=meta["name"],
            uid=f"pod-{self._num_created}",
            attempt=int(own.get(labels.ATTEMPT, 0)),
            node_rank=int(own.get(labels.NODE_RANK, 0)),
            phase=PodPhase.PENDING,
            created_at=self.engine.now(),
            fell_back=own.get(labels.CAPACITY) == Capacity.ANY,
            template=own[labels.TEMPLATE],
            export=ObservedExport(own[labels.EXPORT]) if labels.EXPORT in own else None,
            gated={"name": GATE} in spec.get("schedulingGates", ()),
            memory=spec["containers"][0].get("resources", {}).get("limits", {}).get("memory"),
        )
        affinity = spec.get("affinity", {}).get("nodeAffinity", {})
        pod = SimulatedPod(
            job.metadata.name,
            observed,
            spec["terminationGracePeriodSeconds"],
            int(env.get(environment.NUM_NODES) or 1),
            avoid=_avoided_nodes(affinity),
            spot_only="requiredDuringSchedulingIgnoredDuringExecution" in affinity,
            is_standby=env.get(environment.STANDBY) == "1",
            must_join=environment.MASTER_ADDR not in env,
            group=spec.get("schedulingGroup", {}).get("podGroupName", ""),
        )
        self.pods[observed.name] = pod
        self._watchdog.pod_created(self.jobs[pod.job], observed)
        version = self._send_all(key, observed)
        self.pod_changed(pod)
        # The scheduler may have bound the pod since: that change is newer than this response.
        return key, version, observed

    def patch_workload(self, action: PatchWorkload) -> tuple[int, Json] | None:
        """Change a Workload on behalf of the operator; None: it has changed in between, or is deleted."""
        self.num_writes += 1
        thing = self.queue.patch(action)
        return None if thing is None else (self._version, thing)

    def delete_workload(self, name: str, uid: str) -> None:
        """Delete a Workload on behalf of the operator."""
        self.num_writes += 1
        self.queue.delete(name, uid)

    def delete_child(self, job: str, kind: str, name: str) -> None:
        """Delete an optional object on behalf of the operator."""
        self.num_writes += 1
        if (kind, job, name) in self.children:
            self.children.discard((kind, job, name))
            self.group_sizes.pop(name, None)
            self._send_all((kind, job, name), None)

    def open_gate(self, name: str, uid: str) -> None:
        """Remove the scheduling gate of a pod on behalf of the operator."""
        self.num_writes += 1
        pod = self.pods.get(name)
        if pod is not None and pod.observed.uid == uid and pod.observed.gated:
            self.change(pod, gated=False)
            self.gate_opened()

    def resize_pod(self, name: str, uid: str, memory: str) -> tuple[Key, int, ObservedPod] | None:
        """Change the memory of a pod on behalf of the operator; return None if it does not exist."""
        self.num_writes += 1
        pod = self.pods.get(name)
        if pod is None or pod.observed.uid != uid:
            return None
        if (job := self.jobs.get(pod.job)) is not None:
            self._watchdog.pod_resized(job, pod.observed, memory)
        self.change(pod, memory=memory)
        return ("Pod", pod.job, name), self._version, pod.observed

    def delete_pod(self, name: str, uid: str, grace_seconds: int | None) -> None:
        """Request the deletion of a pod on behalf of the operator."""
        self.num_writes += 1
        pod = self.pods.get(name)
        if pod is not None and pod.observed.uid == uid:
            if (job := self.jobs.get(pod.job)) is not None:
                self._watchdog.pod_deleted(job, pod.observed)
            self._mark_deleted(pod, grace_seconds)

    def evict(self, pod: SimulatedPod, disruption: str | None) -> None:
        """Request the deletion of a pod on behalf of the cluster."""
        if pod.observed.name in self.pods and pod.observed.deleted_at is None:
            if disruption is not None:
                self.change(pod, disruption=disruption)
            self._mark_deleted(pod, None)

    def _mark_deleted(self, pod: SimulatedPod, grace_seconds: int | None) -> None:
        observed = pod.observed
        grace = pod.grace_seconds if grace_seconds is None else grace_seconds
        if grace == 0 or pod.node is None or observed.phase in (PodPhase.SUCCEEDED, PodPhase.FAILED):
            self.remove(pod)
            return
        if observed.deleted_at is not None:
            grace = min(grace, int(observed.grace.total_seconds()))
        self.change(pod, deleted_at=observed.deleted_at or self.engine.now(), grace=timedelta(seconds=grace))
        self.pod_changed(pod)

    def change(self, pod: SimulatedPod, **changes: Any) -> None:
        """Change the reported state of a pod."""
        if self.pods.get(pod.observed.name) is pod:
            pod.observed = observed = replace(pod.observed, **changes)
            self._send_all(("Pod", pod.job, observed.name), observed)

    def remove(self, pod: SimulatedPod) -> None:
        """Remove a pod. If its node is connected, its processes end, too."""
        if self.pods.get(pod.observed.name) is not pod:
            return
        del self.pods[pod.observed.name]
        self._send_all(("Pod", pod.job, pod.observed.name), None)
        if pod.node is not None:
            pod.node.pods.discard(pod.observed.name)
            if pod.node.connected:
                pod.end(137)
        self.pod_changed(pod)

    # -- nodes --------------------------------------------------------------------------------------------------------

    def node_changed(self, node: SimulatedNode) -> None:
        """Send the changed state of a node to the watches."""
        self._send_all(("Node", "", node.name), _observed_node(node))

    def _workload_changed(self, job: str, name: str, thing: Json | None) -> None:
        self._send_all((WORKLOAD, job, name), thing)

    def _send_all(self, key: Key, value: Any, version: int | None = None) -> int:
        version = self._next_version() if version is None else version
        for watch in self.watches:
            watch.send(key, version, value)
        return version

    def _next_version(self) -> int:
        self._version += 1
        return self._version


def _avoided_nodes(affinity: Manifest) -> frozenset[str]:
    """Return the names of the nodes against which a node affinity has a preference."""
    terms = affinity.get("preferredDuringSchedulingIgnoredDuringExecution", ())
    fields = [field for term in terms for field in term["preference"].get("matchFields", ())]
    return frozenset(name for field in fields for name in field["values"])


def _observed_node(node: SimulatedNode) -> ObservedNode | None:
    """Return a node as the operator observes it; None if it is healthy."""
    state = ObservedNode(lost=node.lost, gone=not node.exists, leaving=node.leaving)
    return None if state == HEALTHY else state
