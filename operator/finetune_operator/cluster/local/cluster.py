"""The local cluster: one job, its objects in files, its pods on this machine. Implements `cluster.protocol.Cluster`.

The owner holds the job's lock, so the state in memory is authoritative and the files follow it.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_contract.heartbeat import Heartbeat, Reply
from finetune_operator.api import labels
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.cluster.local.files import Warn, read_or_recover, write_json
from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.local.jobs import key_of, store_job, with_spec
from finetune_operator.cluster.local.kubelet.container import LOOPBACK
from finetune_operator.cluster.local.kubelet.kubelet import Kubelet, KubeletContext
from finetune_operator.cluster.local.kubelet.pod import format_timestamp
from finetune_operator.cluster.local.kubelet.volumes import token_files
from finetune_operator.cluster.local.ports import JobPorts
from finetune_operator.cluster.local.settings import LOCAL
from finetune_operator.cluster.local.task_scope import TaskScope
from finetune_operator.cluster.observe import observe_pod
from finetune_operator.cluster.protocol import Clock, ConflictError, JobKey
from finetune_operator.coordinator.beats import HeartbeatStore, PodIdentity
from finetune_operator.coordinator.changes import JobChanges
from finetune_operator.plan.model.types import (
    Action,
    Create,
    DeleteJob,
    DeletePod,
    Event,
    Manifest,
    Observed,
    split_exports,
)
from finetune_operator.plan.model.view import oldest_attempt
from finetune_operator.plan.replies import reply_to

MAX_EVENTS = 200
"""Maximum number of events kept per job. The oldest are dropped."""
HOLD_SECONDS = 2 * LOCAL.beat_seconds
"""Time for which the reply to a pod without ranks may be held."""


class LocalCluster:
    """One job with its pods, ConfigMaps, events and heartbeats."""

    def __init__(self, home: Home, job: FineTuneJob, now: Clock, tasks: TaskScope, warn: Warn) -> None:
        self._key = key_of(job)
        self._folder = home.job(self._key)
        self._job: FineTuneJob | None = job
        self.heartbeats = HeartbeatStore()
        """The last heartbeats of its supervisors."""
        self._now = now
        self._listening_since = now()
        self._warn = warn
        self._writing = asyncio.Lock()
        self.wake = asyncio.Event()
        """Set by every change."""
        self.changes = JobChanges(lambda: HOLD_SECONDS)
        """Wakes the pods without ranks that wait for a change of their job."""
        self.ports = JobPorts(self._folder.endpoint, warn)
        self._configs = _read_objects(self._folder.configs, warn)
        self._events = read_or_recover(self._folder.events, _events, warn) or []
        self._identities: dict[str, PodIdentity] = {}
        context = KubeletContext(
            now=now,
            spawn=tasks.spawn,
            changed=self.wake.set,
            warn=warn,
            configs=self._config_data,
            master_port=self.ports.master_port,
        )
        self.kubelet = Kubelet(home, self._key, context)

    @property
    def job(self) -> FineTuneJob | None:
        """The job; None after its deletion."""
        return self._job

    # -- Cluster ------------------------------------------------------------------------------------------------------

    async def get_job(self, key: JobKey) -> FineTuneJob | None:
        """Return the job if it has this key."""
        return self._job if key == self._key else None

    async def observe(self, job: FineTuneJob) -> Observed:
        """Return the current state. A deleted pod that has ended is returned once more, then removed."""
        pods = self.kubelet.pods
        seen = [observed for pod in pods if (observed := observe_pod(pod.value)) is not None]
        await self.kubelet.remove_ended(frozenset(pod.uid for pod in pods))
        meta = job.metadata
        of_attempts, exports = split_exports(seen)
        return Observed(
            pods=of_attempts,
            exports=exports,
            beats=self.heartbeats.of_job(meta.namespace, meta.name, oldest_attempt=oldest_attempt(job.status)),
            configs=frozenset(self._configs),
            listening_since=self._listening_since,
        )

    async def write_status(self, job: FineTuneJob, status: FineTuneJobStatus) -> None:
        """Write the status.

        Raises:
            ConflictError: the job has changed since it was read.
        """
        async with self._writing:
            if self._job is None or self._job.metadata.resource_version != job.metadata.resource_version:
                raise ConflictError
            await self._store(self._job.model_copy(update={"status": status}))

    async def apply(self, job: FineTuneJob, action: Action) -> None:
        """Execute one action."""
        if isinstance(action, Create):
            await self._create(action.manifest)
        elif isinstance(action, DeletePod):
            await self.kubelet.delete(action.name, action.uid, action.grace_seconds)
        elif isinstance(action, DeleteJob):
            self._job = None
            self.changes.notify(self._key)
            self.wake.set()

    async def emit(self, job: FineTuneJob, event: Event) -> None:
        """Store an event for `finetune describe`. A repeated event only raises its count."""
        now = format_timestamp(self._now())
        kind = "Warning" if event.warning else "Normal"
        for known in self._events:
            if (known["type"], known["reason"], known["message"]) == (kind, event.reason, event.message):
                known |= {"count": known["count"] + 1, "lastTimestamp": now}
                break
        else:
            first = {"type": kind, "reason": event.reason, "message": event.message, "count": 1}
            self._events.append({**first, "firstTimestamp": now, "lastTimestamp": now})
        self._events = self._events[-MAX_EVENTS:]
        try:
            await asyncio.to_thread(write_json, self._folder.events, copy.deepcopy(self._events))
        except OSError as error:
            self._warn(f"{self._folder.events} cannot be written: {error}")

    async def authenticate_token(self, token: str) -> PodIdentity | None:
        """Return the existing pod that a token was created for; None if there is none."""
        digest = _digest(token)
        if digest not in self._identities:
            self._identities = await asyncio.to_thread(self._read_identities)
        identity = self._identities.get(digest)
        living = {pod.uid for pod in self.kubelet.pods}
        return identity if identity is not None and identity.pod_uid in living else None

    # -- methods for the runner ---------------------------------------------------------------------------------------

    async def suspend(self, suspend: bool) -> None:
        """Set spec.suspend, as a user would with kubectl."""
        async with self._writing:
            if self._job is not None and self._job.spec.suspend != suspend:
                spec = self._job.spec.model_copy(update={"suspend": suspend})
                await self._store(with_spec(self._job, spec))

    def answer(self, beat: Heartbeat) -> Reply:
        """Return the reply to a heartbeat. Each attempt has its own rendezvous port on this machine."""
        reply = reply_to(self._job, beat, LOCAL, lambda _: LOOPBACK)
        if reply.world is None:
            return reply
        port = self.ports.master_port(reply.world.attempt)
        local_world = reply.world.model_copy(update={"master_port": port})
        return reply.model_copy(update={"world": local_world})

    # -- objects ------------------------------------------------------------------------------------------------------

    async def _create(self, manifest: Manifest) -> None:
        name = manifest["metadata"]["name"]
        if manifest["kind"] == "Pod":
            await self.kubelet.create(manifest)
        elif name not in self._configs:
            self._configs[name] = manifest
            await asyncio.to_thread(write_json, self._folder.configs / f"{name}.json", manifest)
            self.kubelet.recheck_waiting_pods()
            self.wake.set()

    async def _store(self, job: FineTuneJob) -> None:
        version = str(int(job.metadata.resource_version or 0) + 1)
        job = job.model_copy(update={"metadata": job.metadata.model_copy(update={"resource_version": version})})
        await asyncio.to_thread(store_job, self._folder, job)
        self._job = job
        self.changes.notify(self._key)
        self.wake.set()

    def _config_data(self, name: str) -> Mapping[str, str] | None:
        config = self._configs.get(name)
        return None if config is None else config.get("data") or {}

    def _read_identities(self) -> dict[str, PodIdentity]:
        identities = {}
        for pod in self.kubelet.pods:
            job = (pod.value["metadata"].get("labels") or {}).get(labels.JOB, self._key.name)
            for path in token_files(pod.value, pod.files.folder):
                try:
                    token = path.read_text(encoding="utf-8")
                except OSError:
                    continue
                identities[_digest(token)] = PodIdentity(self._key.namespace, job, pod.name, pod.uid)
        return identities


def _digest(token: str) -> str:
    # Lookup is by digest, so that its timing reveals nothing about a token.
    return hashlib.sha256(token.strip().encode()).hexdigest()


def _read_objects(folder: Path, warn: Warn) -> dict[str, Manifest]:
    objects: dict[str, Manifest] = {}
    for path in sorted(folder.glob("*.json")):
        if (found := read_or_recover(path, _manifest, warn)) is not None:
            objects[found["metadata"]["name"]] = found
    return objects


def _manifest(value: Any) -> Manifest:
    if not isinstance(value, dict) or not isinstance(value["metadata"]["name"], str):
        raise TypeError("not a Kubernetes object")
    return value


def _events(value: Any) -> list[dict[str, Any]]:
    for event in value:
        if not isinstance(event["count"], int) or not isinstance(event["message"] + event["reason"], str):
            raise TypeError("not a list of events")
    return list(value)
