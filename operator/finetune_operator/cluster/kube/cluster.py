"""The real cluster: fulfils `cluster.protocol.Cluster` from caches, and writes through the API server.

It wakes jobs itself: whatever changes in its caches, its nodes and its beats asks for a pass, by its urgency.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_contract.heartbeat import Heartbeat, Order, Reply
from finetune_operator.api.job import FineTuneJob, FineTuneJobStatus
from finetune_operator.api.reasons import Reason
from finetune_operator.cluster.kube.beats.pace import BeatPace
from finetune_operator.cluster.kube.beats.store import JobBeats
from finetune_operator.cluster.kube.beats.tokens import Bearer, TokenReviewer
from finetune_operator.cluster.kube.client.client import (
    CONFLICT,
    MERGE,
    NOT_FOUND,
    PARTIAL,
    ApiError,
    Json,
    KubeApi,
)
from finetune_operator.cluster.kube.client.events import EventSender
from finetune_operator.cluster.kube.client.objects import (
    BY_KIND,
    CONFIGS,
    JOBS,
    PODS,
    KubeChild,
    KubeJob,
    KubePod,
    decode_child,
    decode_created,
    decode_pod,
    owner_uid,
    refusal_body,
    status_body,
    with_status,
)
from finetune_operator.cluster.kube.client.refusals import Refusals, judge
from finetune_operator.cluster.kube.watch.cache import Cache, Entry, ObjectKey
from finetune_operator.cluster.kube.watch.nodes import NodeBook
from finetune_operator.cluster.kube.watch.reflector import key_of
from finetune_operator.cluster.kube.work.queue import WorkQueue
from finetune_operator.cluster.kube.work.throttle import ProgressThrottle
from finetune_operator.cluster.kube.work.urgency import Gang, Urgency, is_over, is_progress, job_news, pod_news
from finetune_operator.cluster.protocol import Clock, ConflictError, JobKey
from finetune_operator.coordinator.beats import PodIdentity
from finetune_operator.manifests import layout
from finetune_operator.plan.model.types import WELL, Action, Create, DeletePod, Event, Manifest, Observed, Refusal
from finetune_operator.plan.model.view import members_of, nodes_of, oldest_attempt
from finetune_operator.plan.replies import reply_to
from finetune_operator.settings import Settings

log = logging.getLogger(__name__)

SETTLE_SECONDS = 0.3
"""How long good news of a job wait for more of them."""
MAX_SETTLE_SECONDS = 5.0
"""And at most, while very many jobs wait for a pass: what creates pods comes before what merely tells of them."""
BUSY_DEPTH = 16
"""Jobs that wait for a pass when good news begin to wait longer."""


@dataclass(frozen=True)
class Pace:
    """How often progress is heard and written."""

    seconds_per_job: float = 5.0
    """Least time between two writes of one job's progress."""
    writes_per_second: float = 20.0
    """Most such writes of all jobs together."""
    beats_per_second: float = 500.0
    """Most beats that are asked for: with very many pods, each beats less often."""


@dataclass(frozen=True)
class World:
    """What the cluster works with."""

    api: KubeApi
    queue: WorkQueue[JobKey]
    events: EventSender
    clock: Clock
    nodes: NodeBook


class KubeCluster:
    """Jobs, pods, services and ConfigMaps of the namespaces that the operator looks after."""

    def __init__(self, world: World, settings: Settings, pace: Pace) -> None:
        self._api = world.api
        self._queue = world.queue
        self._events = world.events
        self._clock = world.clock
        self._settings = settings
        self._beat_pace = BeatPace(settings, pace.beats_per_second)
        self._throttle: ProgressThrottle[JobKey] = ProgressThrottle(
            pace.seconds_per_job, pace.writes_per_second, burst=pace.writes_per_second
        )
        self.jobs: Cache[KubeJob] = Cache(lambda job: job.key, self._job_changed)
        self.pods: Cache[KubePod] = Cache(lambda pod: pod.job, self._pod_changed)
        self.services: Cache[KubeChild] = Cache(lambda child: child.job, self._child_changed)
        self.configs: Cache[KubeChild] = Cache(lambda child: child.job, self._child_changed)
        self._children: dict[str, Cache[Any]] = {"Pod": self.pods, "Service": self.services, "ConfigMap": self.configs}
        self._nodes = world.nodes
        self._refusals = Refusals()
        self.beats = JobBeats(self.wake)
        self.authority = ""
        """Certificates that supervisors are to trust, PEM; where not empty, each job's ConfigMap holds them."""
        self._reviewer = TokenReviewer(world.api, settings.coordinator_audience, self._find_pod)

    # -- Cluster ------------------------------------------------------------------------------------------------------

    async def get_job(self, key: JobKey) -> FineTuneJob | None:
        """The job as last seen, own writes included."""
        found = self.jobs.get(ObjectKey(*key))
        if found is not None and found.job is None:
            await self._refuse(found)
        return found.job if found is not None else None

    async def observe(self, job: FineTuneJob) -> Observed:
        """What is cached of a job's children. Those of a predecessor under the same name are none of them."""
        key, uid = _key(job), job.metadata.uid
        pods = tuple(pod.observed for pod in self.pods.group(key) if pod.owner_uid == uid)
        names = nodes_of(job.status, pods)
        nodes = {name: state for name in names if (state := self._nodes.of(name)) != WELL}
        return Observed(
            pods=pods,
            nodes=nodes,
            refusal=self._refusals.of(key, job),
            beat_seconds=self._beat_pace.expected(asyncio.get_running_loop().time()),
            beats=self.beats.of(*key, oldest_attempt=oldest_attempt(job.status)),
            services=frozenset(child.name for child in self.services.group(key) if child.owner_uid == uid),
            configs=frozenset(child.name for child in self.configs.group(key) if child.owner_uid == uid),
        )

    async def write_status(self, job: FineTuneJob, status: FineTuneJobStatus) -> None:
        """Write the status, unless the job has changed since it was read. Mere progress waits until it may be written.

        What is not written yet follows anew from what is observed, so nothing is lost when it waits.
        """
        key, now = _key(job), asyncio.get_running_loop().time()
        if is_progress(job.status, status) and (wait := self._throttle.delay(key, now)) > 0:
            self._queue.add_after(key, wait)
            return
        try:
            written = await self._api.replace(JOBS.path(*key, "status"), status_body(job, status))
        except ApiError as error:
            if error.status in (CONFLICT, NOT_FOUND):
                raise ConflictError(str(error)) from error
            raise
        self._throttle.wrote(key, now)
        self._put(self.jobs, with_status(job, status, written), written)

    async def apply(self, job: FineTuneJob, action: Action) -> None:
        """Carry out one action."""
        if isinstance(action, Create):
            await self._create(job, action.manifest)
        elif isinstance(action, DeletePod):
            await self._delete_pod(job, action)
        else:
            await self._delete_job(job)

    async def emit(self, job: FineTuneJob, event: Event) -> None:
        """Hand an event to the sender, and log it."""
        self._events.tell(job, event)
        found = self.jobs.get(ObjectKey(*_key(job)))
        status = found.job.status if found is not None and found.job is not None else job.status
        about: dict[str, Any] = {"job": str(_key(job)), "attempt": status.attempt, "reason": event.reason}
        ended = next((entry for entry in status.attempts if entry.reason == event.reason), None)
        if ended is not None and ended.rank is not None:
            about |= {"attempt": ended.attempt, "rank": ended.rank}
        log.log(logging.WARNING if event.warning else logging.INFO, "%s", event.message, extra=about)

    async def whose_token(self, token: str) -> PodIdentity | None:
        """The pod that a token was issued to, by TokenReview."""
        return await self._reviewer.whose(token)

    # -- for the coordinator ------------------------------------------------------------------------------------------

    def answer(self, beat: Heartbeat) -> Reply:
        """What a supervisor is told: the newest attempt, and to save where its node is about to go."""
        found = self.jobs.get(ObjectKey(beat.namespace, beat.job))
        pod = self.pods.get(ObjectKey(beat.namespace, beat.pod))
        leaving = pod is not None and bool(self._nodes.of(pod.observed.node).leaving)
        reply = reply_to(found.job if found is not None else None, beat, self._settings)
        order = Order.SAVE_AND_STOP if leaving else reply.order
        seconds = self._beat_pace.ask(len(self.pods), asyncio.get_running_loop().time())
        if beat.waiting and reply.beat_seconds is not None:
            seconds = min(seconds, self._beat_pace.hurry(reply.beat_seconds, self.beats.num_waiting))
        return reply.model_copy(update={"order": order, "beat_seconds": seconds})

    async def tell_authority(self) -> None:
        """Write the authority into the ConfigMaps that are there already; it is in all later ones from the start."""
        for key in [ObjectKey(child.job.namespace, child.name) for child in self.configs.values()]:
            change = {"data": {layout.CA_FILE: self.authority}}
            try:
                await self._api.request("PATCH", CONFIGS.path(*key), change, content_type=MERGE, accept=PARTIAL)
            except ApiError as error:
                if error.status != NOT_FOUND:
                    log.warning("the ConfigMap %s/%s has not got the authority: %s", *key, error)

    # -- who wants a pass ---------------------------------------------------------------------------------------------

    def wake(self, key: JobKey, urgency: Urgency) -> None:
        """Ask for a pass, at once or later."""
        if urgency is Urgency.NOW:
            self._queue.add(key)
        elif urgency is not Urgency.NEVER:
            delay = 0.0
            if urgency is Urgency.PROGRESS:
                delay = self._throttle.delay(key, asyncio.get_running_loop().time())
            self._queue.add_after(key, max(self._settle_seconds(), delay))

    def _settle_seconds(self) -> float:
        return min(SETTLE_SECONDS * max(1.0, self._queue.depth / BUSY_DEPTH), MAX_SETTLE_SECONDS)

    def _job_changed(self, key: ObjectKey, old: KubeJob | None, new: KubeJob | None) -> None:
        if new is None:
            self.beats.forget(JobKey(*key))
            self._throttle.forget(JobKey(*key))
            self._refusals.forget(JobKey(*key))
        self.wake(JobKey(*key), job_news(old, new))

    def _pod_changed(self, key: ObjectKey, old: KubePod | None, new: KubePod | None) -> None:
        pod = new or old
        assert pod is not None
        gang = self._gang(pod)
        self.wake(pod.job, pod_news(old, new, gang) if gang is not None else Urgency.NOW)

    def _gang(self, pod: KubePod) -> Gang | None:
        """What a pod's attempt has come to; None where its job is not known."""
        found = self.jobs.get(ObjectKey(*pod.job))
        if found is None or found.job is None:
            return None
        members = members_of(found.job.status, found.job.spec)
        pods = [other.observed for other in self.pods.group(pod.job)]
        attempt = pod.observed.attempt
        if (attempt, pod.observed.node_rank) in members:
            # Perhaps one that was kept: it is as important as the newest.
            attempt = found.job.status.attempt
            pods = [other for other in pods if (other.attempt, other.node_rank) in members]
        else:
            pods = [other for other in pods if other.attempt == attempt]
        return Gang(
            size=len(members),
            num_pods=len(pods),
            num_ready=sum(other.ready for other in pods),
            over=is_over(found.job.status, attempt),
        )

    def _child_changed(self, key: ObjectKey, old: KubeChild | None, new: KubeChild | None) -> None:
        if new is None and old is not None:
            self.wake(old.job, Urgency.SOON)

    def node_changed(self, name: str) -> None:
        """Wake all jobs with a pod on a node."""
        for pod in self.pods.values():
            if pod.observed.node == name:
                self.wake(pod.job, Urgency.NOW)

    # -- in detail ----------------------------------------------------------------------------------------------------

    def _find_pod(self, bearer: Bearer) -> PodIdentity | None:
        pod = self.pods.get(ObjectKey(bearer.namespace, bearer.pod))
        if pod is None or pod.observed.uid != bearer.pod_uid:
            return None
        return PodIdentity(bearer.namespace, pod.job.name, bearer.pod, bearer.pod_uid)

    async def _create(self, job: FineTuneJob, manifest: Manifest) -> None:
        kind, meta = manifest["kind"], manifest["metadata"]
        if kind == "ConfigMap" and self.authority:
            manifest = {**manifest, "data": {**manifest["data"], layout.CA_FILE: self.authority}}
        try:
            created = await self._api.create(BY_KIND[kind].path(meta["namespace"]), manifest)
        except ApiError as error:
            if error.already_exists:
                await self._find_existing(job, manifest)
                return
            self._refused(job, judge(job, kind, meta["name"], error, self._clock()))
            raise
        self._refusals.forget(_key(job))
        self._put(self._children[kind], decode_created(kind, created), created)

    def _refused(self, job: FineTuneJob, refusal: Refusal | None) -> None:
        """The next pass writes it into the status. That the job itself is wrong is told with that."""
        if refusal is None:
            return
        self._refusals.take(_key(job), job, refusal)
        if refusal.hold_until is None:
            self._events.tell(job, Event(Reason.FAILED_CREATE, refusal.sentence, warning=True))

    async def _find_existing(self, job: FineTuneJob, manifest: Manifest) -> None:
        """It is there: ours, made before this process began or since; a predecessor's; or a stranger's."""
        kind, meta = manifest["kind"], manifest["metadata"]
        try:
            found = await self._api.get(BY_KIND[kind].path(meta["namespace"], meta["name"]))
        except ApiError as error:
            if error.status == NOT_FOUND:
                # It went in between, and its end is on its way here.
                return
            raise
        # A predecessor's goes with it, and its end wakes the job.
        if owner_uid(found) == job.metadata.uid:
            self._put(self._children[kind], decode_pod(found) if kind == "Pod" else decode_child(found), found)
        elif not owner_uid(found):
            sentence = f"{kind} {meta['name']} is there already and is not of this job: delete it, or rename the job"
            self._events.tell(job, Event(Reason.NAME_TAKEN, sentence, warning=True))
            self._queue.add_after(_key(job), 60.0)

    def _put(self, cache: Cache[Any], value: Any, thing: Json) -> None:
        if value is not None:
            cache.put_written(key_of(thing), Entry(int(thing["metadata"]["resourceVersion"]), value))

    async def _delete_pod(self, job: FineTuneJob, action: DeletePod) -> None:
        options: dict[str, Any] = {"preconditions": {"uid": action.uid}}
        if action.grace_seconds is not None:
            options["gracePeriodSeconds"] = action.grace_seconds
        answer = await self._delete(PODS.path(job.metadata.namespace, action.name), options)
        if answer is not None and answer.get("kind") == "Pod" and answer["metadata"].get("deletionTimestamp"):
            self._put(self.pods, decode_pod(answer), answer)

    async def _delete_job(self, job: FineTuneJob) -> None:
        options = {"preconditions": {"uid": job.metadata.uid}, "propagationPolicy": "Background"}
        await self._delete(JOBS.path(*_key(job)), options)

    async def _delete(self, path: str, options: Mapping[str, Any]) -> Json | None:
        """Delete an object; None where it is gone, or another one has taken its name."""
        try:
            return await self._api.delete(path, options)
        except ApiError as error:
            if error.status in (NOT_FOUND, CONFLICT):
                return None
            raise

    async def _refuse(self, job: KubeJob) -> None:
        """Say in the status why a job cannot be read."""
        body = refusal_body(job, self._clock())
        if body is None:
            return
        try:
            await self._api.request("PATCH", JOBS.path(*job.key, "status"), body, content_type=MERGE)
        except ApiError as error:
            if error.status not in (CONFLICT, NOT_FOUND):
                raise


def _key(job: FineTuneJob) -> JobKey:
    return JobKey(job.metadata.namespace, job.metadata.name)
