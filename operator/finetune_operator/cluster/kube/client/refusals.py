"""Creations that the API server refused: recorded for the plan, with a message for the status.

The API server would refuse an invalid object each time: its job is held until it is edited, and retried at intervals
in case a policy has changed. After any other failed creation, the plan creates nothing for the job until a delay is
over, which increases with each failure. Heartbeats and other changes request reconciles in the meantime.
"""

from __future__ import annotations

import difflib
import re
from datetime import datetime, timedelta
from typing import NamedTuple

from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.names import CONTAINER
from finetune_operator.cluster.kube.client.client import BAD_REQUEST, CONFLICT, MERGE, NOT_FOUND, ApiError, KubeApi
from finetune_operator.cluster.kube.client.objects import JOBS, KubeJob, refusal_body
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.plan.model.types import Refusal

FORBIDDEN, UNPROCESSABLE = 403, 422
INVALID = frozenset({BAD_REQUEST, UNPROCESSABLE})
"""Status codes of a creation that mean that the object itself is invalid."""
REFUSED = INVALID | {FORBIDDEN}
"""Status codes of a creation that require an action of the user or the administrator."""
FIRST_DELAY_SECONDS = 0.25
MAX_DELAY_SECONDS = 60.0
"""Bounds of the delay after failed creations of a job."""
HOLD = timedelta(seconds=60)
"""Delay before an invalid object of a job is created again."""
UNKNOWN_FIELD = re.compile(r'unknown field "([^"]+)"')
OF_RESOURCES = re.compile(
    r"spec\.containers\[0]\.resources|must specify (?:requests|limits)\.|(?:maximum|minimum) \S+ usage per |"
    r"max limit to request ratio per "
)
"""Parts of the messages of a LimitRange or a quota about the resources of the trainer's container."""
IMAGE_UNSERVED = re.compile(
    r'unknown field "spec\.volumes\[\d+]\.image"|spec\.volumes\[\d+]: .*must specify a volume type'
)
"""Messages of an API server that does not serve image volumes."""
LIMIT = re.compile(r"less than or equal to (\S+) limit of (\w+)")
SIMILARITY = 0.75
"""Similarity of two names at which one counts as a misspelling of the other."""
FIELDS = re.findall(
    r"\w+",
    """
    metadata spec labels annotations activeDeadlineSeconds affinity automountServiceAccountToken containers dnsConfig
    dnsPolicy enableServiceLinks hostAliases hostIPC hostNetwork hostPID hostUsers imagePullSecrets initContainers
    nodeSelector preemptionPolicy priorityClassName resourceClaims restartPolicy runtimeClassName schedulerName
    schedulingGates securityContext serviceAccountName shareProcessNamespace terminationGracePeriodSeconds tolerations
    topologySpreadConstraints volumes args command env envFrom image imagePullPolicy lifecycle livenessProbe name ports
    readinessProbe resizePolicy resources startupProbe terminationMessagePath terminationMessagePolicy volumeDevices
    volumeMounts workingDir limits requests claims fsGroup runAsGroup runAsNonRoot runAsUser seccompProfile
    supplementalGroups capabilities privileged readOnlyRootFilesystem allowPrivilegeEscalation mountPath subPath
    readOnly key operator value effect tolerationSeconds nodeAffinity podAffinity podAntiAffinity maxSkew topologyKey
    whenUnsatisfiable labelSelector matchLabels emptyDir configMap secret hostPath persistentVolumeClaim claimName
    sizeLimit medium defaultMode items optional valueFrom fieldRef secretKeyRef configMapKeyRef
    """,
)
"""Pod fields that are typical in a podTemplate, for suggestions."""


class _RecordedRefusal(NamedTuple):
    uid: str
    generation: int
    refusal: Refusal


class CreationError(ApiError):
    """A creation failed. The plan knows until when to create nothing, so other work for the job need not wait."""

    def __init__(self, error: ApiError, delay_seconds: float) -> None:
        super().__init__(error.status, error.reason, error.message, delay_seconds)


class _Hold(NamedTuple):
    uid: str
    generation: int
    attempt: int
    num_failures: int
    until: datetime


class Refusals:
    """The newest refusal of each job, valid until its spec changes, and the delay of its next creation."""

    def __init__(self) -> None:
        self._recorded: dict[JobKey, _RecordedRefusal] = {}
        self._holds: dict[JobKey, _Hold] = {}

    def record(self, key: JobKey, job: FineTuneJob, refusal: Refusal) -> None:
        """Record a refusal for the job's current generation."""
        self._recorded[key] = _RecordedRefusal(job.metadata.uid, job.metadata.generation, refusal)

    def get(self, key: JobKey, job: FineTuneJob) -> Refusal | None:
        """Return the refusal of the job's current generation; None if there is none."""
        recorded = self._recorded.get(key)
        if recorded is None or (recorded.uid, recorded.generation) != (job.metadata.uid, job.metadata.generation):
            return None
        return recorded.refusal

    def hold(self, key: JobKey, job: FineTuneJob, now: datetime, least_seconds: float = 0.0) -> float:
        """Count a failed creation, and return the delay before the next one, in seconds.

        An edit of the job and a new attempt request other objects, so they begin without delay.

        Args:
            key: the job's key.
            job: the job.
            now: the current time.
            least_seconds: shortest delay, as the API server requests it.
        """
        num_failures = 0
        if (known := self._valid_hold(key, job)) is not None:
            num_failures = known.num_failures
        # The exponent is bounded, so that it does not overflow.
        seconds = max(min(FIRST_DELAY_SECONDS * 2.0 ** min(num_failures, 32), MAX_DELAY_SECONDS), least_seconds)
        meta, until = job.metadata, now + timedelta(seconds=seconds)
        self._holds[key] = _Hold(meta.uid, meta.generation, job.status.attempt, num_failures + 1, until)
        return seconds

    def held_until(self, key: JobKey, job: FineTuneJob) -> datetime | None:
        """Return the time before which nothing may be created for a job; None: no creation has failed."""
        known = self._valid_hold(key, job)
        return known.until if known is not None else None

    def forget(self, key: JobKey) -> None:
        """Drop the refusal and the delay of a job: a creation succeeded, or the job was deleted."""
        self._recorded.pop(key, None)
        self._holds.pop(key, None)

    def _valid_hold(self, key: JobKey, job: FineTuneJob) -> _Hold | None:
        known, meta = self._holds.get(key), job.metadata
        same = known is not None and known[:3] == (meta.uid, meta.generation, job.status.attempt)
        return known if same else None


async def write_refusal(api: KubeApi, job: KubeJob, now: datetime) -> None:
    """Report in the status why a job cannot be read."""
    body = refusal_body(job, now)
    if body is None:
        return
    try:
        await api.request("PATCH", JOBS.path(*job.key, "status"), body, content_type=MERGE)
    except ApiError as error:
        if error.status not in (CONFLICT, NOT_FOUND):
            raise


def classify_refusal(job: FineTuneJob, kind: str, name: str, error: ApiError, now: datetime) -> Refusal | None:
    """Return what a failed creation means for its job; None if no user action is needed."""
    if error.status not in REFUSED:
        return None
    if error.status not in INVALID:
        message = f"the API server refused to create {kind} {name}: {error.message}"
        advice = _advise_resources(job, error.message)
        return Refusal(f"{_as_clause(message)}; {advice}" if advice else message)
    return Refusal(_explain(job, kind, error.message), hold_until=now + HOLD)


def _advise_resources(job: FineTuneJob, message: str) -> str | None:
    """Return what to write in topology.resources; None if that does not decide whether the pod is accepted."""
    if OF_RESOURCES.search(message) is None or _template_sets_resources(job):
        return None
    limit = LIMIT.search(message)
    example = f", e.g. {limit[1]}: {limit[2]}" if limit is not None else ""
    return (
        "a LimitRange or a quota of the namespace restricts the resources of pods; "
        f"write what each pod needs in spec.topology.resources{example}, which sets both the request and the limit"
    )


def _template_sets_resources(job: FineTuneJob) -> bool:
    spec = (job.spec.pod_template or {}).get("spec") or {}
    return any(item.get("name") == CONTAINER and "resources" in item for item in spec.get("containers") or ())


def describe_unserved(job: FineTuneJob, message: str) -> str | None:
    """Return which feature of the job's pods the API server does not serve; None if the message has another cause.

    An API server without a feature does not know its field, or drops it: a volume then has no source.
    """
    if job.spec.model.image is not None and IMAGE_UNSERVED.search(message):
        return (
            "spec.model.image: this cluster does not mount images (that needs Kubernetes 1.35 or newer, or the feature "
            "gate ImageVolume); copy the weights to a volume or a bucket, write their place as base, and leave image "
            "out"
        )
    return None


def _explain(job: FineTuneJob, kind: str, message: str) -> str:
    if kind == "Pod" and (advice := _advise_resources(job, message)):
        return f"the API server rejects the Pod of this job: {_as_clause(message)}; {advice}"
    if kind == "Pod" and (unserved := describe_unserved(job, message)):
        return unserved
    if kind != "Pod" or job.spec.pod_template is None:
        return f"the API server rejects the {kind} of this job: {_as_clause(message)}; ask your cluster administrator"
    if fields := UNKNOWN_FIELD.findall(message):
        return " ".join(f"{_describe_unknown(field)}." for field in fields).removesuffix(".")
    return (
        f"spec.podTemplate: the API server rejects the pod: {_as_clause(message)}; "
        "correct spec.podTemplate and apply the job again"
    )


def _describe_unknown(field: str) -> str:
    parent, _, name = field.rpartition(".")
    similar = difflib.get_close_matches(name, FIELDS, n=1, cutoff=SIMILARITY)
    path = re.sub(r"\[[0-9]+]", "", f"pod.{parent}".rstrip("."))
    instead = f"write {similar[0]}" if similar else f"write a field that 'kubectl explain {path}' lists"
    return f"spec.podTemplate.{field}: a pod has no field {name}; {instead}, or remove it"


def _as_clause(message: str) -> str:
    return message.strip().rstrip(".")
