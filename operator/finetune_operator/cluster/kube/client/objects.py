"""Where the objects are on the API server, and the little that is kept of each. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from finetune_operator.api import conditions, labels, names, reasons
from finetune_operator.api import job as api
from finetune_operator.api.job import FineTuneJob, FineTuneJobStatus, ObjectMeta
from finetune_operator.api.managed import is_ours
from finetune_operator.cluster.kube.client.client import Json
from finetune_operator.cluster.kube.watch.memory import lean
from finetune_operator.cluster.observe import observe_pod
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.plan.model.types import ObservedPod

OWNED = f"{labels.MANAGED_BY}={names.OPERATOR}"
"""Label selector of all that the operator creates."""


@dataclass(frozen=True)
class Resource:
    """A kind of object, as paths name it."""

    root: str
    plural: str

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """Path of a collection (of all namespaces where none is given), of an object, or of a part of it."""
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
"""What the plan creates."""


@dataclass(frozen=True, slots=True)
class KubeJob:
    """A job as stored, or the sentence that says why it cannot be read."""

    key: JobKey
    uid: str
    version: str
    job: FineTuneJob | None
    refusal: str = ""
    conditions: tuple[Json, ...] = ()
    """Those of a job that cannot be read; for all others they are in `job`."""
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


def decode_job(thing: Json) -> KubeJob | None:
    """Read a job; None where it is being deleted or is another controller's."""
    meta = thing["metadata"]
    if meta.get("deletionTimestamp") or not is_ours(thing):
        return None
    key = JobKey(meta["namespace"], meta["name"])
    try:
        # The API server has refused what its CRD does not know. What only we do not know is of a newer CRD, which comes
        # before its operator in an upgrade and outlives it in a rollback.
        job = FineTuneJob.model_validate(thing, extra="ignore")
    except ValidationError as error:
        conditions = tuple((thing.get("status") or {}).get("conditions") or ())
        refusal = explain(error)
        return KubeJob(key, meta["uid"], meta["resourceVersion"], None, refusal, conditions, meta.get("generation", 1))
    return KubeJob(key, meta["uid"], meta["resourceVersion"], lean(job))


def decode_pod(pod: Json) -> KubePod | None:
    """Read a pod; None where it is no job's."""
    observed, child = observe_pod(pod), decode_child(pod)
    return KubePod(child.job, child.owner_uid, observed) if observed is not None and child is not None else None


def decode_created(kind: str, meta: Json) -> KubePod | KubeChild | None:
    """Read an object that was created just now from its metadata alone: nobody has done anything with it yet."""
    return decode_pod({**meta, "spec": {}, "status": {}}) if kind == "Pod" else decode_child(meta)


def decode_child(thing: Json) -> KubeChild | None:
    """Read an object's metadata; None where it is no job's."""
    meta = thing["metadata"]
    job = (meta.get("labels") or {}).get(labels.JOB)
    owner = owner_uid(thing)
    return KubeChild(JobKey(meta["namespace"], job), owner, meta["name"]) if job and owner else None


def owner_uid(thing: Json) -> str:
    """UID of the job that controls an object; empty where none does."""
    owners = thing["metadata"].get("ownerReferences") or ()
    return next((owner["uid"] for owner in owners if owner["kind"] == api.KIND and owner.get("controller")), "")


def explain(error: ValidationError) -> str:
    """Say in a sentence what is wrong with a job that cannot be read."""
    fault = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    return f"{where}: {fault['msg']}; write it as the present version of the FineTuneJob asks for"


def with_status(job: FineTuneJob, status: FineTuneJobStatus, written: Json) -> KubeJob:
    """The job as it is stored after a status write that was taken, from the metadata that came back."""
    meta = ObjectMeta.model_validate(written["metadata"])
    stored = lean(job.model_copy(update={"metadata": meta, "status": status}))
    return KubeJob(JobKey(meta.namespace, meta.name), meta.uid, meta.resource_version, stored)


def status_body(job: FineTuneJob, status: FineTuneJobStatus) -> Json:
    """What is sent to write a status: the API server takes all the rest from the stored object."""
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
    """Merge patch for the status of a job that cannot be read; None where it says so already."""
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
