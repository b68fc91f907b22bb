"""One process of the operator: a cache, a queue of jobs, heartbeats in memory, and the real `reconcile`.

Implements `cluster.protocol.Cluster`. Its memory is lost with it; the next process starts from a list and the statuses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TypeVar

from finetune_contract.heartbeat import Heartbeat, Reply
from finetune_operator.api.gangs import POD_GROUP
from finetune_operator.api.job import FineTuneJob, SchedulingMode
from finetune_operator.api.kueue import WORKLOAD
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.cluster.kube.client.refusals import Refusals
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.cluster.reconcile import ReconcileResult, reconcile
from finetune_operator.coordinator.beats import HeartbeatStore, PodIdentity
from finetune_operator.plan.model.types import (
    Action,
    Create,
    DeleteChild,
    DeletePod,
    DeleteWorkload,
    Event,
    Manifest,
    Observed,
    ObservedChild,
    ObservedWorkload,
    OpenGate,
    PatchWorkload,
    Refusal,
    ResizePod,
    split_exports,
)
from finetune_operator.plan.model.view import nodes_of, oldest_attempt
from finetune_operator.plan.replies import reply_to
from finetune_operator.settings import Settings
from testing.simulated.engine import Engine, Pause, SimulatedTask
from testing.simulated.server import LaggingWatch, RefusedError, SimulatedApiError, SimulatedApiServer
from testing.simulated.workloads import Json, observe

T = TypeVar("T")
GANG_API = "scheduling.k8s.io/v1alpha2"
PROGRESS_SECONDS = 5.0
"""Delay that batches heartbeats which report only progress into one reconcile."""
MAX_RETRY_SECONDS = 60.0


@dataclass
class ApiConditions:
    """The current quality of calls to the API server."""

    seconds: float = 0.02
    """Mean duration of a call."""
    failing: float = 0.0
    """Share of the calls that fail before they are carried out."""
    lost: float = 0.0
    """Share of the calls that are carried out, but whose response is lost."""


class SimulatedOperator:
    """One operator process, from start to exit."""

    def __init__(
        self,
        engine: Engine,
        server: SimulatedApiServer,
        settings: Settings,
        api: ApiConditions,
        skew_seconds: float = 0.0,
    ) -> None:
        self.num_reconciles = 0
        self._engine = engine
        self._server = server
        self._settings = settings
        self._api = api
        self._skew_seconds = skew_seconds
        self._heartbeats = HeartbeatStore()
        self._refusals = Refusals()
        self._listening_since = self._now()
        self._running: dict[str, SimulatedTask[ReconcileResult]] = {}
        self._dirty: set[str] = set()
        self._due: dict[str, float] = {}
        self._num_errors: dict[str, int] = {}
        self.watch = LaggingWatch(engine, 0.1, self._wake_now)
        server.watches.append(self.watch)
        server.relist(self.watch)

    def close(self) -> None:
        """Exit immediately: running reconciles never finish."""
        self.watch.closed = True
        self._disconnect()
        for task in self._running.values():
            task.cancel()
        self._running.clear()

    def break_watch(self, seconds: float) -> None:
        """Lose the watch events until a relist some time later."""
        self.watch.drop_in_flight()
        self._disconnect()
        self._engine.after(seconds, self._relist)

    def _disconnect(self) -> None:
        self._server.watches = [watch for watch in self._server.watches if watch is not self.watch]

    def _relist(self) -> None:
        if not self.watch.closed:
            if self.watch not in self._server.watches:
                self._server.watches.append(self.watch)
            self.watch.drop_in_flight()
            self._server.relist(self.watch)

    # -- the coordinator ----------------------------------------------------------------------------------------------

    def post(self, beat: Heartbeat) -> Reply:
        """Record a heartbeat and return the reply."""
        known = self._heartbeats.of_job(beat.namespace, beat.job).get(beat.pod_uid)
        if self._heartbeats.record(beat, self._now()):
            urgent = bool(beat.ends or beat.notice) and (
                known is None or (known.beat.ends, known.beat.notice) != (beat.ends, beat.notice)
            )
            self.wake(beat.job, 0.0 if urgent else PROGRESS_SECONDS)
        addresses = {pod.name: pod.reachable_at for pod in self.watch.pods.get(beat.job, {}).values()}
        return reply_to(self.watch.jobs.get(beat.job), beat, self._settings, lambda name: addresses.get(name, ""))

    # -- its queue ----------------------------------------------------------------------------------------------------

    def wake_all(self) -> None:
        """Reconcile every job."""
        for name in list(self.watch.jobs):
            self._wake_now(name)

    def wake(self, name: str, seconds: float) -> None:
        """Reconcile a job after this delay, unless it is due sooner."""
        at = self._engine.time + seconds
        if self._due.get(name, at + 1) > at:
            self._due[name] = at
            self._engine.after(seconds, partial(self._fire, name, at))

    def _wake_now(self, name: str) -> None:
        self.wake(name, 0.0)

    def _fire(self, name: str, at: float) -> None:
        if self.watch.closed or self._due.get(name) != at:
            return
        del self._due[name]
        if name in self._running:
            self._dirty.add(name)
            return
        key = JobKey("default", name)
        self.num_reconciles += 1
        task = SimulatedTask(
            self._engine,
            reconcile(self, key, self._settings, self._now),
            partial(self._reconciled, name),
            SimulatedApiError,
        )
        self._running[name] = task
        task.step()

    def _reconciled(self, name: str, result: ReconcileResult | None, error: Exception | None) -> None:
        self._running.pop(name, None)
        if error is not None:
            count = self._num_errors[name] = self._num_errors.get(name, 0) + 1
            self.wake(name, min(MAX_RETRY_SECONDS, 0.5 * 2 ** min(count, 10)))
        else:
            self._num_errors.pop(name, None)
            if result is not None and result.requeue_after is not None:
                self.wake(name, result.requeue_after.total_seconds())
        if name in self._dirty:
            self._dirty.discard(name)
            self._wake_now(name)

    def _now(self) -> datetime:
        return self._engine.now(self._skew_seconds)

    # -- Cluster ------------------------------------------------------------------------------------------------------

    async def get_job(self, key: JobKey) -> FineTuneJob | None:
        """Return the job from the cache."""
        return self.watch.jobs.get(key.name)

    async def observe(self, job: FineTuneJob) -> Observed:
        """Return the observed state of the job from the cache."""
        name = job.metadata.name
        pods, exports = split_exports(self.watch.pods.get(name, {}).values())
        children = self.watch.children.get(name, set())
        nodes, used = self.watch.nodes, nodes_of(job.status, (*pods, *exports))
        return Observed(
            pods=pods,
            exports=exports,
            beats=self._heartbeats.of_job("default", name, oldest_attempt=oldest_attempt(job.status)),
            services=frozenset(child for kind, child in children if kind == "Service"),
            configs=frozenset(child for kind, child in children if kind == "ConfigMap"),
            nodes={name: nodes[name] for name in used if name in nodes} if nodes else {},
            refusal=self._refusals.get(JobKey("default", name), job),
            create_after=self._refusals.held_until(JobKey("default", name), job),
            listening_since=self._listening_since,
            workloads=_observed(self.watch.workloads.get(name, {})),
            gang_apis={SchedulingMode.POD_GROUP: GANG_API},
            children=tuple(_child(child) for kind, child in sorted(children) if kind == POD_GROUP),
        )

    async def write_status(self, job: FineTuneJob, status: FineTuneJobStatus) -> None:
        """Write the status, unless the job has changed since it was read."""
        stored = await self._call(lambda: self._server.write_status(job, status))
        name = job.metadata.name
        self.watch.take(("Job", name, name), int(stored.metadata.resource_version), stored)

    async def apply(self, job: FineTuneJob, action: Action) -> None:
        """Carry out one action."""
        server = self._server
        if isinstance(action, Create):
            await self._create(job, action.manifest)
        elif isinstance(action, DeletePod):
            await self._call(lambda: server.delete_pod(action.name, action.uid, action.grace_seconds))
        elif isinstance(action, PatchWorkload):
            await self._patch(job, action)
        elif isinstance(action, ResizePod):
            resized = await self._call(lambda: server.resize_pod(action.name, action.uid, action.memory))
            if resized is not None:
                self.watch.take(*resized)
        elif isinstance(action, DeleteWorkload):
            await self._call(lambda: server.delete_workload(action.name, action.uid))
        elif isinstance(action, OpenGate):
            await self._call(lambda: server.open_gate(action.name, action.uid))
        elif isinstance(action, DeleteChild):
            child = action.child
            await self._call(lambda: server.delete_child(job.metadata.name, child.kind, child.name))
        else:
            await self._call(lambda: server.delete_job(job.metadata.name))

    async def _create(self, job: FineTuneJob, manifest: Manifest) -> None:
        key = JobKey("default", job.metadata.name)
        try:
            created = await self._call(lambda: self._server.create(job, manifest))
        except SimulatedApiError as error:
            if isinstance(error, RefusedError):
                self._refusals.record(key, job, Refusal(str(error)))
            self._refusals.hold(key, job, self._now())
            raise
        self._refusals.forget(key)
        self.watch.take(*created)

    async def _patch(self, job: FineTuneJob, action: PatchWorkload) -> None:
        patched = await self._call(lambda: self._server.patch_workload(action))
        if patched is not None:
            version, thing = patched
            self.watch.take((WORKLOAD, job.metadata.name, action.name), version, thing)

    async def emit(self, job: FineTuneJob, event: Event) -> None:
        """Discard the event."""

    async def authenticate_token(self, token: str) -> PodIdentity | None:
        """Return None: the simulation has no tokens."""
        return None

    async def _call(self, carry_out: Callable[[], T]) -> T:
        engine, api = self._engine, self._api
        await Pause(engine.rng.expovariate(1 / api.seconds) / 2)
        chance = engine.rng.random()
        if chance < api.failing:
            raise SimulatedApiError("the API server is not available")
        result = carry_out()
        await Pause(engine.rng.expovariate(1 / api.seconds) / 2)
        if chance < api.failing + api.lost:
            raise SimulatedApiError("the response was lost")
        return result


def _child(name: str) -> ObservedChild:
    return ObservedChild(GANG_API, POD_GROUP, name, f"uid-{name}", int(name.rpartition("-a")[2]))


def _observed(stored: dict[str, Json]) -> tuple[ObservedWorkload, ...]:
    found = map(observe, stored.values())
    return tuple(sorted(found, key=lambda each: (each.created_at, each.num_pods)))
