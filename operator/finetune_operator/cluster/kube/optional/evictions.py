"""The cache of Evictions of pods, and the reports about them. `KubeCluster` delegates to it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from finetune_operator.api import evictions, names
from finetune_operator.cluster.kube.client.client import APPLY, CONFLICT, NOT_FOUND, ApiError, Json, KubeApi
from finetune_operator.cluster.kube.client.objects import Resource
from finetune_operator.cluster.kube.watch.cache import Cache, ChangeListener, Entry
from finetune_operator.cluster.kube.watch.reflector import WatchSource, object_key
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.plan.model.types import ObservedEviction, ReportEviction

EVICTIONS = Resource(f"/apis/{evictions.API_VERSION}", evictions.PLURAL)
OF_POD = re.compile(r"(?P<job>.+)-a\d+-n\d+")
"""Name of a pod: the pod itself may be deleted already."""


@dataclass(frozen=True, slots=True)
class KubeEviction:
    """An Eviction of a pod of a job."""

    job: JobKey
    observed: ObservedEviction


def eviction_source() -> WatchSource[KubeEviction]:
    """Return the Evictions that name this operator as a responder."""
    selector = f"{evictions.RESPONDER} in ({','.join(evictions.ROLES)})"
    return WatchSource(EVICTIONS, decode_eviction, query={"labelSelector": selector})


def decode_eviction(thing: Json) -> KubeEviction | None:
    """Read an Eviction; return None if its target is not a pod of a job."""
    meta, status = thing["metadata"], thing.get("status") or {}
    target = (thing["spec"].get("target") or {}).get("pod") or {}
    match = OF_POD.fullmatch(target.get("name", ""))
    if match is None:
        return None
    own = _own(status.get("responders"))
    observed = ObservedEviction(
        name=meta["name"],
        pod_uid=target["uid"],
        active=_own(status.get("targetResponders")).get("state") == evictions.ACTIVE,
        reported_at=_time(own.get("heartbeatTime")),
        completed=own.get("completionTime") is not None,
    )
    return KubeEviction(JobKey(meta["namespace"], match["job"]), observed)


def _own(entries: Iterable[Json] | None) -> Json:
    return next((entry for entry in entries or () if entry.get("name") == evictions.RESPONDER), {})


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


async def names_responders(api: KubeApi) -> bool:
    """Return whether the API server knows the field of pods that names their responders.

    Raises:
        ApiError: the API server cannot be asked.
    """
    version = await api.get("/version")
    digits = re.match(r"\d+", version.get("minor") or "")
    return version.get("major") == "1" and digits is not None and int(digits[0]) >= evictions.FIRST_MINOR_VERSION


class Evictions:
    """Evictions of pods, if the API server serves them."""

    def __init__(self, api: KubeApi, changed: ChangeListener[KubeEviction]) -> None:
        self._api = api
        self.cache: Cache[KubeEviction] = Cache(lambda eviction: eviction.job, changed)
        self.pods_name_responders = False
        """Whether new pods name the operator as a responder."""

    def of_job(self, key: JobKey) -> tuple[ObservedEviction, ...]:
        """Return the Evictions of a job's pods."""
        return tuple(eviction.observed for eviction in self.cache.group(key))

    async def report(self, namespace: str, action: ReportEviction, now: datetime) -> None:
        """Write the operator's part of an Eviction's status."""
        time = now.isoformat(timespec="seconds").replace("+00:00", "Z")
        own: dict[str, Any] = {"name": evictions.RESPONDER, "heartbeatTime": time, "message": action.message}
        if action.done:
            own["completionTime"] = time
        body = {
            "apiVersion": evictions.API_VERSION,
            "kind": "Eviction",
            "metadata": {"name": action.name, "namespace": namespace},
            "status": {"responders": [own]},
        }
        # Other responders and Kubernetes write other entries of the same list.
        query = {"fieldManager": names.OPERATOR, "force": "true"}
        try:
            path = EVICTIONS.path(namespace, action.name, "status")
            written = await self._api.request("PATCH", path, body, query=query, content_type=APPLY)
        except ApiError as error:
            if error.status not in (CONFLICT, NOT_FOUND):
                raise
            return
        value = decode_eviction(written)
        if value is not None:
            self.cache.put_written(object_key(written), Entry(int(written["metadata"]["resourceVersion"]), value))
