"""The caches of Kueue's objects, and the requests that change Workloads. `KubeCluster` delegates to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune_operator.api import kueue, labels
from finetune_operator.api.job import FineTuneJob
from finetune_operator.cluster.kube.client.client import CONFLICT, MERGE, NOT_FOUND, ApiError, Json, KubeApi
from finetune_operator.cluster.kube.client.objects import Resource, owner_uid
from finetune_operator.cluster.kube.watch.cache import Cache, ChangeListener, Entry, ObjectKey
from finetune_operator.cluster.kube.watch.reflector import object_key
from finetune_operator.cluster.observe_workload import (
    AssignedWorkload,
    Flavor,
    observe_flavor,
    observe_workload,
)
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.plan.model.types import DeleteWorkload, ObservedWorkload, PatchWorkload

log = logging.getLogger(__name__)

ROOT = f"/apis/{kueue.API_VERSION}"
WORKLOADS = Resource(ROOT, "workloads")
FLAVORS = Resource(ROOT, "resourceflavors")
WORKLOAD_PRIORITIES = Resource(ROOT, "workloadpriorityclasses")
PRIORITIES = Resource("/apis/scheduling.k8s.io/v1", "priorityclasses")
DISCOVERY_SECONDS = 30.0
"""Interval at which the operator looks for an API that is not served yet."""


@dataclass(frozen=True)
class KubeWorkload:
    """A Workload of a job."""

    job: JobKey
    owner_uid: str
    """Empty: it has no owner yet."""
    assigned: AssignedWorkload


def decode_workload(thing: Json) -> KubeWorkload | None:
    """Read a Workload; return None if it belongs to no job of this operator."""
    meta = thing["metadata"]
    job, owner = (meta.get("labels") or {}).get(labels.JOB), owner_uid(thing)
    if not job or (meta.get("ownerReferences") and not owner):
        return None
    return KubeWorkload(JobKey(meta["namespace"], job), owner, observe_workload(thing, is_owned=bool(owner)))


def decode_flavor(thing: Json) -> Flavor:
    """Read a ResourceFlavor."""
    return observe_flavor(thing)


class Workloads:
    """Workloads and flavors, if the API server has Kueue's API."""

    def __init__(self, api: KubeApi, changed: ChangeListener[KubeWorkload], wake_all: Callable[[], None]) -> None:
        self._api = api
        self._wake_all = wake_all
        self.cache: Cache[KubeWorkload] = Cache(lambda workload: workload.job, changed)
        self.flavors: Cache[Flavor] = Cache(lambda _: "", lambda _key, _old, _new: wake_all())
        self.served = False
        """Whether Kueue's API is served and the caches are complete."""

    async def discover(self) -> bool:
        """Return whether the API server serves Kueue's API.

        Raises:
            ApiError: the API server cannot be asked.
        """
        try:
            await self._api.get(ROOT)
        except ApiError as error:
            if error.status == NOT_FOUND:
                return False
            raise
        return True

    async def wait_until_served(self) -> None:
        """Wait until the API server serves Kueue's API, which may be installed later."""
        reported = False
        while True:
            try:
                if await self.discover():
                    return
            except ApiError as error:
                log.warning("cannot ask for Kueue's API; retrying in %.0f s: %s", DISCOVERY_SECONDS, error)
            else:
                if not reported:
                    log.warning("the cluster does not serve %s; jobs with a queue are refused", kueue.API_VERSION)
                reported = True
            await asyncio.sleep(DISCOVERY_SECONDS)

    def set_served(self) -> None:
        """Record that the caches are complete."""
        self.served = True
        self._wake_all()

    def of_job(self, key: JobKey, job: FineTuneJob) -> tuple[ObservedWorkload, ...]:
        """Return the Workloads of a job, oldest first. One without an owner counts if the job names it."""
        prebuilt = job.metadata.labels.get(kueue.PREBUILT_LABEL)
        flavors = {
            name: flavor for name in self._flavor_names(key) if (flavor := self.flavors.get(ObjectKey("", name)))
        }
        found = [
            each.assigned.with_flavors(flavors)
            for each in self.cache.group(key)
            if each.owner_uid == job.metadata.uid or (not each.owner_uid and each.assigned.observed.name == prebuilt)
        ]
        return tuple(sorted(found, key=lambda each: (each.created_at, each.num_pods)))

    def _flavor_names(self, key: JobKey) -> set[str]:
        return {name for each in self.cache.group(key) for name in each.assigned.flavors}

    # -- writes -------------------------------------------------------------------------------------------------------

    async def with_priority(self, job: FineTuneJob, manifest: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a Workload's manifest or patch with the priority of its class; unchanged if it requests no pods.

        Raises:
            ApiError: the class cannot be read; the message names it if it does not exist.
        """
        spec = manifest.get("spec") or {}
        if "podSets" not in spec:
            return manifest
        own = job.metadata.labels.get(kueue.PRIORITY_CLASS_LABEL)
        of_pods = spec["podSets"][0]["template"]["spec"].get("priorityClassName")
        if own:
            group, kind, path, name = kueue.GROUP, "WorkloadPriorityClass", WORKLOAD_PRIORITIES, own
        elif of_pods:
            group, kind, path, name = "scheduling.k8s.io", "PriorityClass", PRIORITIES, of_pods
        else:
            return manifest
        value = (await self._api.get(path.path("", name)))["value"]
        reference = {"group": group, "kind": kind, "name": name}
        return {**manifest, "spec": {**spec, "priorityClassRef": reference, "priority": value}}

    async def create(self, job: FineTuneJob, manifest: Mapping[str, Any]) -> Json:
        """Create a Workload and cache it.

        Raises:
            ApiError: it is refused, or exists already.
        """
        body = await self.with_priority(job, manifest)
        path = WORKLOADS.path(job.metadata.namespace)
        created = await self._api.request("POST", path, body, query={"fieldValidation": "Strict"})
        self.put_written(created)
        return created

    async def patch(self, job: FineTuneJob, action: PatchWorkload) -> None:
        """Change a Workload. If it has changed in between or is deleted, its watch requests another reconcile."""
        namespace = job.metadata.namespace
        path = WORKLOADS.path(namespace, action.name, "status" if action.status else "")
        body = await self.with_priority(job, action.patch)
        try:
            written = await self._api.request("PATCH", path, body, content_type=MERGE)
        except ApiError as error:
            if error.status in (CONFLICT, NOT_FOUND):
                return
            raise
        self.put_written(written)

    async def delete(self, job: FineTuneJob, action: DeleteWorkload) -> None:
        """Delete a Workload."""
        path = WORKLOADS.path(job.metadata.namespace, action.name)
        try:
            await self._api.delete(path, {"preconditions": {"uid": action.uid}})
        except ApiError as error:
            if error.status not in (CONFLICT, NOT_FOUND):
                raise

    def put_written(self, thing: Json) -> None:
        """Cache the response to a write."""
        value = decode_workload(thing)
        if value is not None:
            self.cache.put_written(object_key(thing), Entry(int(thing["metadata"]["resourceVersion"]), value))


def must_wake_now(old: KubeWorkload | None, new: KubeWorkload | None) -> bool:
    """Return whether a change of a Workload may start or end something, and is not only an explanation."""
    if old is None or new is None:
        return True
    return _decision(old) != _decision(new)


def _decision(workload: KubeWorkload) -> tuple[object, ...]:
    observed = workload.assigned.observed
    conditions = tuple((each.type, each.status) for each in observed.conditions)
    return conditions, observed.active, observed.num_admitted, workload.owner_uid, observed.request
