"""API paths of the objects, and the parts of each object that the operator keeps. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from finetune_operator.api import conditions, labels, names, reasons
from finetune_operator.api import job as api
from finetune_operator.api.job import FineTuneJob, ObjectMeta
from finetune_operator.api.managed import is_ours
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.cluster.kube.client.client import Json
from finetune_operator.cluster.kube.client.memory import compact
from finetune_operator.cluster.observe import observe_pod
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.plan.model.types import ObservedPod

OWNED_SELECTOR = f"{labels.MANAGED_BY}={names.OPERATOR}"
"""Label selector of all objects that the operator creates."""


@dataclass(frozen=True)
class Resource:
    """A resource type, as API paths name it."""

    root: str
    plural: str

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """Return the path of a collection (in all namespaces if none is given), an object, or its subresource."""
        parts = [self.root, *(("namespaces", namespace) if namespace else ()), self.plural, name, subresource]
        return "/".join(part for part in parts if part)


JOBS = Resource(f"/apis/{api.API_VERSION}", api.PLURAL)
PODS = Resource("/api/v1", "pods")
SERVICES = Resource("/api/v1", "services")
CONFIGS = Resource("/api/v1", "configmaps")
SECRETS = Resource("/api/v1", "secrets")
EVENTS = Resource("/api/v1", "events")
LEASES = Resource("/apis/coordination.k8s.io/v1", "leases")
ENDPOINT_SLICES = Resource("/apis/discovery.k8s.io/v1", "endpointslices")
TOKEN_REVIEWS = Resource("/apis/authentication.k8s.io/v1", "tokenreviews")
BY_KIND = {"Pod": PODS, "Service": SERVICES, "ConfigMap": CONFIGS}
"""Resource types of the objects that the plan creates."""


@dataclass(frozen=True, slots=True)
class KubeJob:
    """A job as stored, or the message that explains why it cannot be read."""

    key: JobKey
    uid: str
    version: str
    job: FineTuneJob | None
    refusal: str = ""
    conditions: tuple[Json, ...] = ()
    """Conditions of a job that cannot be read; otherwise they are in `job`."""
    generation: int = 0


@dataclass(frozen=True, slots=True)
class KubePod:
    """A pod of a job."""

    job: JobKey
    owner_uid: str
    observed: ObservedPod


@dataclass(frozen=True, slots=True)
class KubeChild:
    """A service or a ConfigMap of a job."""

    job: JobKey
    owner_uid: str
    name: str


def decode_job(thing: Json, *, delegates: bool = False) -> KubeJob | None:
    """Read a job; return None if it is being deleted or another controller manages it.

    Args:
        thing: the job as stored.
        delegates: whether jobs that MultiKueue runs in another cluster are read, too.
    """
    meta = thing["metadata"]
    if meta.get("deletionTimestamp") or not is_ours(thing, delegates=delegates):
        return None
    key = JobKey(meta["namespace"], meta["name"])
    try:
        # The API server refuses fields that its CRD does not define. Fields that only this operator does not know come
        # from a newer CRD, which is installed before the operator in an upgrade and stays after a rollback.
        job = FineTuneJob.model_validate(thing, extra="ignore")
    except ValidationError as error:
        conditions = tuple((thing.get("status") or {}).get("conditions") or ())
        refusal = describe_validation_error(error)
        return KubeJob(key, meta["uid"], meta["resourceVersion"], None, refusal, conditions, meta.get("generation", 1))
    return KubeJob(key, meta["uid"], meta["resourceVersion"], compact(job))


def decode_pod(pod: Json) -> KubePod | None:
    """Read a pod; return None if it belongs to no job."""
    observed, child = observe_pod(pod), decode_child(pod)
    return KubePod(child.job, child.owner_uid, observed) if observed is not None and child is not None else None


def decode_created(kind: str, meta: Json, gates: Sequence[Json] | None = None) -> KubePod | KubeChild | None:
    """Read an object from the metadata in the response to its creation; it has no status yet.

    Args:
        kind: Pod, Service or ConfigMap.
        meta: the metadata.
        gates: scheduling gates of the pod.
    """
    if kind != "Pod":
        return decode_child(meta)
    return decode_pod({**meta, "spec": {"schedulingGates": gates or ()}, "status": {}})


def decode_child(thing: Json) -> KubeChild | None:
    """Read an object's metadata; return None if it belongs to no job."""
    meta = thing["metadata"]
    job = (meta.get("labels") or {}).get(labels.JOB)
    owner = owner_uid(thing)
    return KubeChild(JobKey(meta["namespace"], job), owner, meta["name"]) if job and owner else None


def owner_uid(thing: Json) -> str:
    """Return the UID of the job that controls an object; empty if there is none."""
    owners = thing["metadata"].get("ownerReferences") or ()
    return next((owner["uid"] for owner in owners if owner["kind"] == api.KIND and owner.get("controller")), "")


def describe_validation_error(error: ValidationError) -> str:
    """Return a message that names the first invalid field of a job that cannot be read."""
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    return f"{field}: {first['msg']}; write it as the current version of FineTuneJob requires"


def with_status(job: FineTuneJob, status: FineTuneJobStatus, written: Json) -> KubeJob:
    """Return the job as stored after a successful status write, from the metadata in the response."""
    meta = ObjectMeta.model_validate(written["metadata"])
    stored = compact(job.model_copy(update={"metadata": meta, "status": status}))
    return KubeJob(JobKey(meta.namespace, meta.name), meta.uid, meta.resource_version, stored)


def status_body(job: FineTuneJob, status: FineTuneJobStatus) -> Json:
    """Return the body of a status write; the API server keeps the other fields of the stored object."""
    return {
        "apiVersion": api.API_VERSION,
        "kind": api.KIND,
        "metadata": {
            "name": job.metadata.name,
            "namespace": job.metadata.namespace,
            "uid": job.metadata.uid,
            "resourceVersion": job.metadata.resource_version,
        },
        "status": status.model_dump(mode="json", by_alias=True, exclude_none=True),
    }


def refusal_body(job: KubeJob, now: datetime) -> Json | None:
    """Return the merge patch for the status of a job that cannot be read; None if the status is up to date."""
    accepted: dict[str, Any] = {
        "type": conditions.ConditionType.ACCEPTED.value,
        "status": "False",
        "reason": reasons.Reason.INVALID_SPEC.value,
        "message": job.refusal,
        "observedGeneration": job.generation,
        "lastTransitionTime": now.isoformat(),
    }
    old = next((condition for condition in job.conditions if condition["type"] == accepted["type"]), None)
    if old is not None and old["status"] == "False":
        accepted["lastTransitionTime"] = old["lastTransitionTime"]
    if old == accepted:
        return None
    others = [condition for condition in job.conditions if condition["type"] != accepted["type"]]
    status = {"reason": accepted["reason"], "message": job.refusal, "conditions": [accepted, *others]}
    return {"metadata": {"resourceVersion": job.version, "uid": job.uid}, "status": status}
