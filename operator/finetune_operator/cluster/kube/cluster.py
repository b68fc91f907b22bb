"""The Kubernetes cluster: implements `cluster.protocol.Cluster` with caches for reads and the API server for writes.

It also requests reconciles: every change in its caches, its nodes and its heartbeats wakes a job, by its urgency.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import datetime
from functools import partial
from typing import Any

from finetune_contract.heartbeat import Heartbeat, Order, Reply
from finetune_operator.api.evictions import POD_FIELD
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.kueue import WORKLOAD, queue_of
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.cluster.kube.beats.attention import ListeningClock
from finetune_operator.cluster.kube.beats.interval import HeartbeatInterval
from finetune_operator.cluster.kube.beats.signatures import BoundPod
from finetune_operator.cluster.kube.beats.store import JobHeartbeats
from finetune_operator.cluster.kube.beats.tokens import TokenReviewer
from finetune_operator.cluster.kube.client.client import (
    CONFLICT,
    NOT_FOUND,
    ApiError,
    Json,
    delete_if_present,
)
from finetune_operator.cluster.kube.client.objects import (
    BY_KIND,
    JOBS,
    KubeChild,
    KubeJob,
    KubePod,
    Resource,
    decode_child,
    decode_created,
    decode_pod,
    owner_uid,
    status_body,
    with_status,
)
from finetune_operator.cluster.kube.client.refusals import CreationError, Refusals, classify_refusal, write_refusal
from finetune_operator.cluster.kube.dependencies import ClusterDependencies
from finetune_operator.cluster.kube.optional.children import (
    PLURALS,
    Child,
    OptionalChildren,
    decoder,
    resource_of,
)
from finetune_operator.cluster.kube.optional.evictions import Evictions, KubeEviction
from finetune_operator.cluster.kube.options import UpdateLimits
from finetune_operator.cluster.kube.queue.workloads import WORKLOADS, KubeWorkload, Workloads, must_wake_now
from finetune_operator.cluster.kube.watch.cache import Cache, Entry, ObjectKey
from finetune_operator.cluster.kube.watch.reflector import object_key
from finetune_operator.cluster.kube.work import authority
from finetune_operator.cluster.kube.work.pods import PodRequests
from finetune_operator.cluster.kube.work.throttle import ProgressThrottle
from finetune_operator.cluster.kube.work.urgency import (
    GangReadiness,
    Urgency,
    classify_job_change,
    classify_pod_change,
    is_progress,
    measure_gang,
    moves_the_meeting,
)
from finetune_operator.cluster.protocol import ConflictError, JobKey
from finetune_operator.coordinator.beats import PodIdentity
from finetune_operator.coordinator.changes import JobChanges
from finetune_operator.manifests import layout
from finetune_operator.plan.model.types import (
    HEALTHY,
    Action,
    Create,
    DeleteChild,
    DeletePod,
    DeleteWorkload,
    Event,
    Manifest,
    Observed,
    OpenGate,
    PatchWorkload,
    Refusal,
    ReportEviction,
    ResizePod,
    split_exports,
)
from finetune_operator.plan.model.view import nodes_of, oldest_attempt
from finetune_operator.plan.replies import reply_to
from finetune_operator.settings import Settings

log = logging.getLogger(__name__)
SETTLE_SECONDS = 0.3
"""Delay used to batch non-urgent changes of a job."""
MAX_SETTLE_SECONDS = 5.0
"""Upper bound of that delay while many jobs wait: creating pods is more important than reporting on them."""
BUSY_DEPTH = 16
"""Queue depth from which the delay grows."""
BUSY_JOBS = 8
"""Number of jobs that are created or recovered at the same time above which heartbeats, events and progress come later.
These jobs may wait for the API server, which the rest would slow down further."""


class KubeCluster:
    """Jobs, pods, services and ConfigMaps of the namespaces that the operator watches."""

    def __init__(self, dependencies: ClusterDependencies, settings: Settings, limits: UpdateLimits) -> None:
        self._api = dependencies.api
        self._queue = dependencies.queue
        self._events = dependencies.events
        self._clock = dependencies.clock
        self._settings = settings
        self._beat_interval = HeartbeatInterval(settings, limits.beats_per_second)
        self._throttle: ProgressThrottle[JobKey] = ProgressThrottle(
            limits.seconds_per_job, limits.writes_per_second, burst=limits.writes_per_second
        )
        self.jobs: Cache[KubeJob] = Cache(lambda job: job.key, self._job_changed)
        self.pods: Cache[KubePod] = Cache(lambda pod: pod.job, self._pod_changed)
        self.services: Cache[KubeChild] = Cache(lambda child: child.job, self._child_changed)
        self.configs: Cache[KubeChild] = Cache(lambda child: child.job, self._child_changed)
        self._children: dict[str, Cache[Any]] = {"Pod": self.pods, "Service": self.services, "ConfigMap": self.configs}
        self.workloads = Workloads(dependencies.api, self._workload_changed, self._wake_queued)
        self.optional = OptionalChildren(dependencies.api, self._child_changed, self._wake_all)
        self.evictions = Evictions(dependencies.api, self._eviction_changed)
        self._nodes = dependencies.nodes
        self._refusals = Refusals()
        self._requests = PodRequests(dependencies.api)
        self._listening_since: datetime | None = None
        self.beats = JobHeartbeats(self.wake)
        self.changes = JobChanges(self._beat_interval.hold_seconds)
        """Wakes the pods without ranks that wait for a change of their job."""
        self.authority = ""
        """PEM certificates that supervisors trust; if not empty, each job's ConfigMap contains them."""
        self.attention = ListeningClock(dependencies.clock, time.monotonic)
        self._reviewer = TokenReviewer(dependencies.api, settings.coordinator_audience, self._find_pod, self.attention)

    # -- Cluster ------------------------------------------------------------------------------------------------------

    async def get_job(self, key: JobKey) -> FineTuneJob | None:
        """Return the cached job, own writes included."""
        found = self.jobs.get(ObjectKey(*key))
        if found is not None and found.job is None:
            await write_refusal(self._api, found, self._clock())
        return found.job if found is not None else None

    async def observe(self, job: FineTuneJob) -> Observed:
        """Return the cached children of a job. Children of an earlier job with the same name are excluded."""
        key, uid = _key(job), job.metadata.uid
        # The coordinator starts before the first reconcile.
        self._listening_since = self._listening_since or self._clock()
        pods, exports = split_exports(pod.observed for pod in self.pods.group(key) if pod.owner_uid == uid)
        names = nodes_of(job.status, (*pods, *exports))
        nodes = {name: state for name in names if (state := self._nodes.get(name)) != HEALTHY}
        return Observed(
            pods=pods,
            exports=exports,
            nodes=nodes,
            refusal=self._refusals.get(key, job),
            create_after=self._refusals.held_until(key, job),
            listening_since=self._listening_since,
            deaf=self.attention.periods(),
            beat_seconds=self._beat_interval.longest_seconds(asyncio.get_running_loop().time()),
            beats=self.beats.of_job(*key, oldest_attempt=oldest_attempt(job.status)),
            services=frozenset(child.name for child in self.services.group(key) if child.owner_uid == uid),
            configs=frozenset(child.name for child in self.configs.group(key) if child.owner_uid == uid),
            workloads=self.workloads.of_job(key, job),
            queues_served=self.workloads.served,
            gang_apis=self.optional.gang_apis(),
            optional_apis=self.optional.served | ({POD_FIELD} if self.evictions.pods_name_responders else frozenset()),
            evictions=self.evictions.of_job(key),
            children=self.optional.of_job(key, uid),
            claims_served=job.spec.topology.gpu_claim_template_name is None or await self._requests.serves_claims(),
        )

    async def write_status(self, job: FineTuneJob, status: FineTuneJobStatus) -> None:
        """Write the status, unless the job has changed since it was read. Progress is rate-limited.

        Progress that is not written now is computed again from the next observation, so nothing is lost.
        """
        key, now = _key(job), asyncio.get_running_loop().time()
        if is_progress(job.status, status) and (wait := self._throttle.delay(key, now, busy=self._is_busy)) > 0:
            self._queue.add_after(key, wait)
            return
        # The count tells the API server's rules about edits that this write is none, see `api.rules.edits`.
        status = status.model_copy(update={"writes": job.status.writes + 1})
        try:
            written = await self._api.replace(JOBS.path(*key, "status"), status_body(job, status))
        except ApiError as error:
            if error.status in (CONFLICT, NOT_FOUND):
                raise ConflictError(str(error)) from error
            raise
        self._throttle.record_write(key, now)
        self._cache_written(self.jobs, with_status(job, status, written), written)

    async def apply(self, job: FineTuneJob, action: Action) -> None:
        """Carry out one action."""
        if isinstance(action, Create):
            await self._create(job, action.manifest)
        elif isinstance(action, DeletePod):
            self._cache_pod(await self._requests.delete(job.metadata.namespace, action))
        elif isinstance(action, PatchWorkload):
            await self.workloads.patch(job, action)
        elif isinstance(action, DeleteWorkload):
            await self.workloads.delete(job, action)
        elif isinstance(action, OpenGate):
            self._cache_pod(await self._requests.open_gate(job.metadata.namespace, action))
        elif isinstance(action, DeleteChild):
            await self.optional.delete(job.metadata.namespace, action.child)
        elif isinstance(action, ReportEviction):
            await self.evictions.report(job.metadata.namespace, action, self._clock())
        elif isinstance(action, ResizePod):
            self._cache_pod(await self._requests.resize(job.metadata.namespace, action))
        else:
            await self._delete_job(job)

    async def emit(self, job: FineTuneJob, event: Event) -> None:
        """Pass an event to the sender, and log it."""
        self._events.enqueue(job, event)
        found = self.jobs.get(ObjectKey(*_key(job)))
        status = found.job.status if found is not None and found.job is not None else job.status
        about: dict[str, Any] = {"job": str(_key(job)), "attempt": status.attempt, "reason": event.reason}
        ended = next((entry for entry in status.attempts if entry.reason == event.reason), None)
        if ended is not None and ended.rank is not None:
            about |= {"attempt": ended.attempt, "rank": ended.rank}
        log.log(logging.WARNING if event.warning else logging.INFO, "%s", event.message, extra=about)

    async def authenticate_token(self, token: str) -> PodIdentity | None:
        """Return the pod that a token was issued to, by TokenReview; None if the token is not valid."""
        return await self._reviewer.authenticate(token)

    # -- coordinator --------------------------------------------------------------------------------------------------

    def answer_heartbeat(self, beat: Heartbeat) -> Reply:
        """Build the reply to a supervisor: its newest attempt, and an order to save if its node is about to stop."""
        found = self.jobs.get(ObjectKey(beat.namespace, beat.job))
        pod = self.pods.get(ObjectKey(beat.namespace, beat.pod))
        leaving = pod is not None and bool(self._nodes.get(pod.observed.node).leaving)
        job = found.job if found is not None else None
        reply = reply_to(job, beat, self._settings, partial(self._address_of, beat))
        order = Order.SAVE_AND_STOP if leaving else reply.order
        now = asyncio.get_running_loop().time()
        seconds = self._beat_interval.choose_seconds(len(self.pods), now, busy=self._is_busy)
        if (beat.waiting or beat.joining) and reply.beat_seconds is not None:
            waiting_seconds = self._beat_interval.choose_waiting_seconds(reply.beat_seconds, self.beats.num_waiting)
            seconds = min(seconds, waiting_seconds)
        return reply.model_copy(update={"order": order, "beat_seconds": seconds})

    def _address_of(self, beat: Heartbeat, name: str) -> str:
        """Return the address of a pod of the heartbeat's job; empty if it has none."""
        pod = self.pods.get(ObjectKey(beat.namespace, name))
        return pod.observed.reachable_at if pod is not None and pod.owner_uid == beat.job_uid else ""

    async def distribute_authority(self) -> None:
        """Write the certificate authority into all existing ConfigMaps; new ones contain it from the start."""
        keys = [ObjectKey(child.job.namespace, child.name) for child in self.configs.values()]
        await authority.distribute(self._api, keys, self.authority)

    # -- reconcile requests -------------------------------------------------------------------------------------------

    def wake(self, key: JobKey, urgency: Urgency) -> None:
        """Request a reconcile, immediately or later."""
        if urgency is Urgency.NOW:
            self._queue.add(key)
        elif urgency is not Urgency.NEVER:
            delay = 0.0
            if urgency is Urgency.PROGRESS:
                delay = self._throttle.delay(key, asyncio.get_running_loop().time(), busy=self._is_busy)
            self._queue.add_after(key, max(self._settle_seconds(), delay))

    @property
    def _is_busy(self) -> bool:
        """Whether many jobs are being created or recovered."""
        return self._queue.num_urgent > BUSY_JOBS

    def _settle_seconds(self) -> float:
        return min(SETTLE_SECONDS * max(1.0, self._queue.depth / BUSY_DEPTH), MAX_SETTLE_SECONDS)

    def _job_changed(self, key: ObjectKey, old: KubeJob | None, new: KubeJob | None) -> None:
        if new is None:
            self.beats.forget(JobKey(*key))
            self._throttle.forget(JobKey(*key))
            self._refusals.forget(JobKey(*key))
        self.changes.notify(key)
        self.wake(JobKey(*key), classify_job_change(old, new))

    def _pod_changed(self, key: ObjectKey, old: KubePod | None, new: KubePod | None) -> None:
        pod = new or old
        assert pod is not None
        if new is None:
            self._requests.forget(pod.observed.uid)
        found = self.jobs.get(ObjectKey(*pod.job))
        if found is not None and found.job is not None and moves_the_meeting(found.job, old, new):
            self.changes.notify(pod.job)
        gang = self._gang_readiness(pod)
        self.wake(pod.job, classify_pod_change(old, new, gang) if gang is not None else Urgency.NOW)

    def _gang_readiness(self, pod: KubePod) -> GangReadiness | None:
        """Return how many pods of a pod's attempt exist and are ready; None if its job is unknown, or it has none."""
        found = self.jobs.get(ObjectKey(*pod.job))
        if found is None or found.job is None or pod.observed.export is not None:
            return None
        return measure_gang(found.job, pod.observed, [other.observed for other in self.pods.group(pod.job)])

    def _child_changed(self, key: ObjectKey, old: Child | None, new: Child | None) -> None:
        if new is None and old is not None:
            self.wake(old.job, Urgency.SOON)

    def _eviction_changed(self, key: ObjectKey, old: KubeEviction | None, new: KubeEviction | None) -> None:
        if new is not None and (old is None or old.observed.active != new.observed.active):
            self.wake(new.job, Urgency.NOW)

    def _wake_all(self) -> None:
        """Request a reconcile of all jobs."""
        for found in self.jobs.values():
            self.wake(found.key, Urgency.SOON)

    def _workload_changed(self, key: ObjectKey, old: KubeWorkload | None, new: KubeWorkload | None) -> None:
        workload = new or old
        assert workload is not None
        self.wake(workload.job, Urgency.NOW if must_wake_now(old, new) else Urgency.PROGRESS)

    def _wake_queued(self) -> None:
        """Request a reconcile of all jobs with a queue."""
        for found in self.jobs.values():
            if found.job is not None and queue_of(found.job) is not None:
                self.wake(found.key, Urgency.SOON)

    def node_changed(self, name: str) -> None:
        """Request a reconcile of all jobs with a pod on a node."""
        for pod in self.pods.values():
            if pod.observed.node == name:
                self.changes.notify(pod.job)
                self.wake(pod.job, Urgency.NOW)

    # -- writes -------------------------------------------------------------------------------------------------------

    def _find_pod(self, bound: BoundPod) -> PodIdentity | None:
        pod = self.pods.get(ObjectKey(bound.namespace, bound.pod))
        if pod is None or pod.observed.uid != bound.pod_uid:
            return None
        return PodIdentity(bound.namespace, pod.job.name, bound.pod, bound.pod_uid)

    async def _create(self, job: FineTuneJob, manifest: Manifest) -> None:
        kind, meta = manifest["kind"], manifest["metadata"]
        if kind == "ConfigMap" and self.authority:
            manifest = {**manifest, "data": {**manifest["data"], layout.CA_FILE: self.authority}}
        try:
            if kind == WORKLOAD:
                created = await self.workloads.create(job, manifest)
            elif kind == "Pod":
                created = await self._requests.create(meta["namespace"], manifest)
            else:
                created = await self._api.create(_resource(manifest).path(meta["namespace"]), manifest)
        except ApiError as error:
            if error.already_exists:
                await self._adopt_existing(job, manifest)
                return
            now = self._clock()
            self._record_refusal(job, classify_refusal(job, kind, meta["name"], error, now))
            seconds = self._refusals.hold(_key(job), job, now, error.retry_after_seconds or 0.0)
            raise CreationError(error, seconds) from error
        self._refusals.forget(_key(job))
        if kind in PLURALS:
            self._cache_optional(manifest, created)
        elif kind != WORKLOAD:
            gates = (manifest.get("spec") or {}).get("schedulingGates")
            self._cache_written(self._children[kind], decode_created(kind, created, gates=gates), created)

    def _record_refusal(self, job: FineTuneJob, refusal: Refusal | None) -> None:
        """Record a refusal for the next reconcile, which writes it into the status.

        An invalid manifest gets no event here: the status change reports it.
        """
        if refusal is None:
            return
        self._refusals.record(_key(job), job, refusal)
        if refusal.hold_until is None:
            self._events.enqueue(job, Event(Reason.FAILED_CREATE, refusal.message, warning=True))

    async def _adopt_existing(self, job: FineTuneJob, manifest: Manifest) -> None:
        """Handle a name that already exists: cache our own object, wait for an earlier job's, report a foreign one."""
        kind, meta = manifest["kind"], manifest["metadata"]
        try:
            found = await self._api.get(_resource(manifest).path(meta["namespace"], meta["name"]))
        except ApiError as error:
            if error.status == NOT_FOUND:
                # It was deleted in between; the watch will report that.
                return
            raise
        # The object of an earlier job is deleted with that job; its deletion wakes this one.
        if kind == WORKLOAD and owner_uid(found) == job.metadata.uid:
            self.workloads.put_written(found)
        elif kind in PLURALS and owner_uid(found) == job.metadata.uid:
            self._cache_optional(manifest, found)
        elif owner_uid(found) == job.metadata.uid:
            value = decode_pod(found) if kind == "Pod" else decode_child(found)
            self._cache_written(self._children[kind], value, found)
        elif not owner_uid(found):
            message = (
                f"{kind} {meta['name']} already exists and does not belong to this job: delete it, or rename the job"
            )
            self._events.enqueue(job, Event(Reason.NAME_TAKEN, message, warning=True))
            self._queue.add_after(_key(job), 60.0)

    def _cache_optional(self, manifest: Manifest, response: Json) -> None:
        version, kind = manifest["apiVersion"], manifest["kind"]
        self._cache_written(self.optional.cache(version), decoder(version, kind)(response), response)

    def _cache_pod(self, response: Json | None) -> None:
        if response is not None:
            self._cache_written(self.pods, decode_pod(response), response)

    def _cache_written(self, cache: Cache[Any], value: Any, response: Json) -> None:
        if value is not None:
            cache.put_written(object_key(response), Entry(int(response["metadata"]["resourceVersion"]), value))

    async def _delete_job(self, job: FineTuneJob) -> None:
        options = {"preconditions": {"uid": job.metadata.uid}, "propagationPolicy": "Background"}
        await delete_if_present(self._api, JOBS.path(*_key(job)), options)


def _resource(manifest: Manifest) -> Resource:
    kind = manifest["kind"]
    if kind in PLURALS:
        return resource_of(manifest["apiVersion"], kind)
    return WORKLOADS if kind == WORKLOAD else BY_KIND[kind]


def _key(job: FineTuneJob) -> JobKey:
    return JobKey(job.metadata.namespace, job.metadata.name)
